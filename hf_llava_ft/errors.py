"""The one exception that means "the input is wrong", as opposed to "the program is"."""


class UserError(ValueError):
    """Bad input, said in one sentence: what is wrong, where (file, row, id), and what to do about it.

    The command line prints the sentence and exits with code 2; from Python it is an ordinary `ValueError`.
    """
