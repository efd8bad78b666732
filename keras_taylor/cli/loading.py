"""Libraries that are loaded where a command needs them, without their words."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what libraries write to standard error while they are imported, unless an import fails.

    Whatever its log level is, TensorFlow writes lines about the processor.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        shown = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(shown, said.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
