"""Prune in a PyTorch loop.

Run with `KERAS_BACKEND=torch python examples/loop_torch.py`.
"""

import torch  # before keras: the other order can fail when two frameworks are installed

# isort: split
import keras
from quickstart import digits, small_cnn

import keras_taylor


def main(epochs=6):
    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = digits()
    data = torch.utils.data.TensorDataset(torch.tensor(x_train), torch.tensor(y_train))
    batches = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)

    prunable = keras_taylor.PrunableModel(small_cnn())
    weights = prunable.trainable_variables[:-1]  # the last variable accumulates the scores
    optimizer = torch.optim.Adam([v.value for v in weights], lr=2e-3)

    for epoch in range(epochs):
        for x, y in batches:
            loss = torch.nn.functional.cross_entropy(prunable(x, training=True), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            prunable.update_scores()
        if epoch in (1, 2, 3):
            prunable.prune(0.1 * epoch)
        print(f"epoch {epoch + 1}: loss {float(loss):.4f}, {prunable.cost()['params']:,} parameters")

    small = prunable.strip()
    accuracy = float((small.predict(x_test, verbose=0).argmax(1) == y_test).mean())
    print(f"accuracy {accuracy:.2%} with {small.count_params():,} parameters")
    return small, accuracy


if __name__ == "__main__":
    main()
