"""Networks that benchmarks train themselves, on Fashion-MNIST or digits, and their twins in plain PyTorch.

python benchmarks/networks.py resnet20 mobile vgg digits --folder FOLDER --epochs 8
"""

import argparse
import gzip
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
NUM_VALIDATION, BATCH_SIZE = 5000, 128


def fashion():
    """Training, validation and test images with labels; images are normalized."""

    def read(name, offset):
        with gzip.open(FASHION / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    parts = []
    for part in ("train", "t10k"):
        x = read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
        y = read(f"{part}-labels-idx1-ubyte.gz", 8).astype("int64")
        parts.append((((x / 255 - 0.286) / 0.353).astype("float32"), y))
    (x, y), test = parts
    order = np.random.default_rng(0).permutation(len(y))
    held_out, rest = order[:NUM_VALIDATION], order[NUM_VALIDATION:]
    return (x[rest], y[rest]), (x[held_out], y[held_out]), test


def digits():
    """Images of scikit-learn's handwritten digits with labels, and those of the test set."""
    import quickstart

    x, x_test, y, y_test = quickstart.digits()
    return (x, y), (x_test, y_test)


def batches(name, x, y, seed=0):
    """Batches of training images; those of digits as they are, all others flipped and shifted by up to 4."""
    import resnet_cifar

    class Plain(resnet_cifar.Augmented):
        def __getitem__(self, index):
            rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
            return self.x[rows, 4:-4, 4:-4], self.y[rows]

    made = Plain if name.startswith("digits") else resnet_cifar.Augmented
    return made(x, y, BATCH_SIZE, seed=seed)


def _normalized(x, filters, size=3, strides=1, activation=True):
    from keras import layers

    x = layers.Conv2D(filters, size, strides, "same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    return layers.ReLU()(x) if activation else x


def resnet20():
    """A CIFAR-style ResNet-20 with projections where the shape changes."""
    import keras

    inputs = keras.Input((28, 28, 1))
    x = _normalized(inputs, 16)
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            strides = 2 if stage and not block else 1
            y = _normalized(_normalized(x, filters, 3, strides), filters, activation=False)
            if strides > 1:
                x = _normalized(x, filters, 1, strides, activation=False)
            x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x), name="resnet20")


def mobile():
    """A small network of inverted residuals, as in MobileNetV2."""
    import keras

    inputs = keras.Input((28, 28, 1))
    x = _normalized(inputs, 16)
    for filters, strides in ((16, 1), (24, 2), (24, 1), (32, 1), (48, 2), (48, 1), (48, 1)):
        y = _normalized(x, 4 * x.shape[-1], 1)
        y = keras.layers.DepthwiseConv2D(3, strides, "same", use_bias=False)(y)
        y = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(y))
        y = _normalized(y, filters, 1, activation=False)
        x = keras.layers.Add()([x, y]) if x.shape == y.shape else y
    x = keras.layers.GlobalAveragePooling2D()(_normalized(x, 128, 1))
    return keras.Model(inputs, keras.layers.Dense(10)(x), name="mobile")


def vgg():
    """Convolutions one after the other, without shortcuts."""
    import keras

    x = inputs = keras.Input((28, 28, 1))
    for filters in (16, 32, 64):
        x = _normalized(_normalized(x, filters), filters)
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Dense(64, activation="relu")(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(x), name="vgg")


def digits_cnn():
    """The network of `examples/quickstart.py`."""
    import keras

    from keras_taylor.cli.demo import small_network

    model = small_network()
    return keras.Model(model.inputs, model.outputs, name="digits")


NETWORKS = {"resnet20": resnet20, "mobile": mobile, "vgg": vgg, "digits": digits_cnn}


def compiled(model, rate=0.02):
    import keras

    has_softmax = getattr(model.layers[-1], "activation", None) is keras.activations.softmax
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not has_softmax)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def one_cycle(peak, num_steps):
    """A learning rate that rises to the peak within a third of the steps, then falls to zero."""
    import keras

    rise = num_steps // 3
    return keras.optimizers.schedules.CosineDecay(
        peak / 25, max(num_steps - rise, 1), warmup_target=peak, warmup_steps=max(rise, 1)
    )


def train(model, data, epochs, peak=0.1):
    """Trains from scratch, one cycle of the learning rate."""
    made = batches(model.name, *data)
    compiled(model, one_cycle(peak, epochs * len(made)))
    model.fit(made, epochs=epochs, verbose=2)


def torch_twin(model):
    """The same network in plain PyTorch (channels first), weights copied, for pruners of PyTorch modules."""
    import torch
    from torch import nn

    def same(kernel, strides, size):
        total = max((-(-size // strides) - 1) * strides + kernel - size, 0)
        return total // 2, total - total // 2

    def module(layer):
        kind, weights = type(layer).__name__, [torch.tensor(np.array(w)) for w in layer.get_weights()]
        if kind in ("Conv2D", "DepthwiseConv2D"):
            kernel = weights[0].permute(*((3, 2, 0, 1) if kind == "Conv2D" else (2, 3, 0, 1))).contiguous()
            groups = 1 if kind == "Conv2D" else kernel.shape[0]
            size, strides = kernel.shape[-1], layer.strides[0]
            before, after = same(size, strides, layer.input.shape[1])
            made = nn.Conv2d(
                *(kernel.shape[1] * groups, kernel.shape[0], size, strides),
                padding=before if before == after else 0,
                groups=groups,
                bias=False,
            )
            made.weight.data = kernel
            one_more = before != after
            return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), made) if one_more else made
        if kind == "BatchNormalization":
            made = nn.BatchNorm2d(len(weights[0]), eps=layer.epsilon)
            made.weight.data, made.bias.data, made.running_mean, made.running_var = weights
            return made
        if kind == "Dense":
            made = nn.Linear(*weights[0].shape)
            made.weight.data, made.bias.data = weights[0].T.contiguous(), weights[1]
            relu = layer.activation.__name__ == "relu"
            return nn.Sequential(made, nn.ReLU()) if relu else made
        if kind == "Dropout":
            return nn.Dropout(layer.rate)
        return {"ReLU": nn.ReLU, "MaxPooling2D": lambda: nn.MaxPool2d(2)}.get(kind, nn.Identity)()

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.image_size = model.inputs[0].shape[1]
            self.kinds = [(layer.name, type(layer).__name__) for layer in model.layers]
            self.parts = nn.ModuleDict({layer.name: module(layer) for layer in model.layers})
            made = {layer.output.name: layer.name for layer in model.layers}
            self.reads = {
                layer.name: [
                    made[x.name] for x in (layer.input if type(layer.input) is list else [layer.input])
                ]
                for layer in model.layers[1:]
            }

        def forward(self, x):
            values = {self.kinds[0][0]: x}
            for name, kind in self.kinds[1:]:
                inputs = [values[read] for read in self.reads[name]]
                if kind == "Add":
                    values[name] = inputs[0] + inputs[1]
                elif kind == "GlobalAveragePooling2D":
                    values[name] = inputs[0].mean((2, 3))
                elif kind == "Flatten":
                    # Keras flattens channels last; pruners of PyTorch understand channels first only
                    values[name] = inputs[0].flatten(1)
                else:
                    values[name] = self.parts[name](inputs[0])
            return values[self.kinds[-1][0]]

    twin = Twin()
    _reorder_after_flatten(model, twin)
    return twin.eval()


def _reorder_after_flatten(model, twin):
    """The rows of a dense layer behind `Flatten` in the order of channels-first images."""
    import torch

    for number, flatten in enumerate(model.layers):
        if type(flatten).__name__ == "Flatten":
            dense = next(one for one in model.layers[number:] if type(one).__name__ == "Dense")
            height, width, channels = flatten.input.shape[1:]
            part = twin.parts[dense.name]
            linear = part[0] if isinstance(part, torch.nn.Sequential) else part
            kernel = linear.weight.data.reshape(-1, height, width, channels)
            linear.weight.data = kernel.permute(0, 3, 1, 2).reshape(len(kernel), -1).contiguous()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="where the trained networks go")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    import keras

    for name in arguments.networks:
        keras.utils.set_random_seed(0)
        model = NETWORKS[name]()
        data, validation, *_ = digits() if name == "digits" else fashion()
        train(model, data, arguments.epochs)
        accuracy = model.evaluate(*validation, verbose=0, return_dict=True)["accuracy"]
        print(f"{name}: {model.count_params():,} parameters, {accuracy:.2%} of the held-out images")
        model.compile()  # the file holds the network only
        ending = "" if name == "digits" else "_fashion"
        model.save(arguments.folder / f"{name}{ending}.keras")


if __name__ == "__main__":
    main()
