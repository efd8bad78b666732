"""Files that get their name when all of them is written."""

import os
import secrets
import shutil


class AtomicFile:
    """What is being written, beside its target under a name of its own; gone if it stays there."""

    def __init__(self, target):
        # the ending stays: Keras' writers look at it
        self.path = target.with_name(f".unfinished-{secrets.token_hex(4)}-{target.name}").absolute()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        _remove(self.path)

    def move_to(self, target):
        """Moves it there; what was there is gone once it has arrived."""
        old = self.path.with_name(self.path.name + ".old")
        aside = target.exists() and (target.is_dir() or self.path.is_dir())
        if aside:  # a directory takes no other's place in one step, as a file does
            target.rename(old)
        try:
            os.replace(self.path, target)
        except OSError:
            if aside:
                old.rename(target)
            raise
        _remove(old)
        return target


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
