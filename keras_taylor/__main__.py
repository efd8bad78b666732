"""`python -m keras_taylor`: the command line."""

from keras_taylor.cli import main

if __name__ == "__main__":
    main()
