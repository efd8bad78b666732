"""The command `keras-taylor`.

It reads files, calls the public functions of `keras_taylor`, and writes files. The functions themselves live
in the other packages, and the tables, pictures and pages that it prints and writes come from `reports/`.
"""
