"""`python -m keras_taylor`: the command line."""

from keras_taylor.cli.commands import main

if __name__ == "__main__":
    main()
