"""Fine-tuning with the original model as the teacher."""

import keras
from keras import ops

from keras_taylor.reading.cloning import compile_settings
from keras_taylor.scores.losses import BINARY_LOSSES, CLASS_LOSSES, ONE_HOT_LOSSES, kind_of, losses_by_output

TEMPERATURE = 3.0
# Of the compiled loss on labels, where there are some; the rest is the teacher's.
_LABELS_SHARE = 0.5


def distiller(student, teacher, distill=True, has_labels=True):
    """A `keras.distillation.Distiller`, compiled as the student is: its `fit` trains the student.

    Args:
        student: The compiled model to train; its optimizer is used.
        teacher: The model to imitate, whose `trainable` flag is taken away.
        distill: `True`: the outputs are imitated (Hinton et al., Distilling the Knowledge in a Neural
            Network, 2015, at temperature 3 for classes; squared differences for numbers). Else a
            `keras.distillation.DistillationLoss`, or a list of such.
        has_labels: Whether there are labels: half of the loss is then the compiled one.
    """
    settings = compile_settings(student)
    imitation = output_imitation(student) if distill is True else distill
    model = keras.distillation.Distiller(
        teacher, student, imitation, student_loss_weight=_LABELS_SHARE if has_labels else 0.0
    )
    metrics = settings["metrics"] if has_labels and isinstance(settings["metrics"], (list, tuple)) else None
    model.compile(
        optimizer=student.optimizer,
        loss=settings["loss"],
        metrics=metrics,
        run_eagerly=student.run_eagerly,
        jit_compile=student.jit_compile,
    )
    return model


def check_trainable(feed, fit_kwargs, distill):
    """Refuses data without labels where there is no teacher, and weights where there is one.

    Keras' distiller would ignore weights of examples and classes. Batches have to go round all devices.
    """
    feed.check_devices(split=fit_kwargs.get("validation_split") or 0)
    if not (feed.has_targets or distill):
        raise ValueError(
            "The data set yields no labels to fine-tune with. Expected `(x, y)` pairs, `distill=True` (the "
            "given model is the teacher), or `epochs=0` (no fine-tuning). "
            f"Received: ds without labels, epochs={fit_kwargs.get('epochs', 1)}"
        )
    for name, given in (
        ("class_weight", fit_kwargs.get("class_weight")),
        ("sample_weight", feed.has_weights),
    ):
        if given and distill:
            raise ValueError(
                f"`distill` and `{name}` do not go together: `keras.distillation.Distiller` ignores weights. "
                f"Leave one of them out. Received: {name} and distill"
            )


def output_imitation(model, temperature=TEMPERATURE):
    """A `keras.distillation.LogitsDistillation` with a loss for each output, by what it was compiled with."""
    outputs = getattr(model, "_outputs_struct", model.outputs[0])
    flat = keras.tree.flatten(outputs)
    losses = [_Imitation(loss, temperature) for loss in losses_by_output(model, len(flat))]
    structure = keras.tree.pack_sequence_as(outputs, losses)
    return keras.distillation.LogitsDistillation(temperature, structure)


class _Imitation(keras.losses.Loss):
    """How far one output is from the teacher's; both come divided by the temperature."""

    def __init__(self, loss, temperature):
        super().__init__(name="imitation")
        self._kind, self._from_logits = kind_of(loss) if loss is not None else ("", False)
        self._temperature = temperature

    def call(self, teacher, student):
        """Values `(batch, ...)`."""
        t = self._temperature
        if self._kind in CLASS_LOSSES | ONE_HOT_LOSSES and student.shape[-1] > 1:
            if not self._from_logits:
                teacher, student = (ops.log(ops.clip(y * t, 1e-7, 1.0)) / t for y in (teacher, student))
            wanted = ops.log_softmax(teacher)
            return t**2 * ops.sum(ops.exp(wanted) * (wanted - ops.log_softmax(student)), -1)
        if self._kind in BINARY_LOSSES | {"crossentropy", "ce"}:
            return ops.mean(ops.binary_crossentropy(teacher * t, student * t, self._from_logits), -1)
        return t**2 * ops.mean(ops.square(teacher - student), -1)
