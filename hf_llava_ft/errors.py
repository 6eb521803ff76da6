"""The one exception that means "the input is wrong", as opposed to "the program is", and how it is told."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hf_llava_ft.releases import ask_for_report_when_uncaught, sentence_for

EXIT_CODE_FAILURE = 1
EXIT_CODE_BAD_INPUT = 2


class UserError(ValueError):
    """Bad input, said in one sentence: what is wrong, where (file, row, id), and what to do about it.

    The command line prints the sentence and exits with code 2; from Python it is an ordinary `ValueError`.
    """

    @property
    def sentence(self) -> str:
        """The message; without the traceback that a DataLoader worker puts around it."""
        return str(self).rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


def user_error_behind(error: BaseException | None) -> UserError | None:
    """The `UserError` that an exception was raised from or while handling, if there is one.

    Libraries put their own exceptions around ours; `datasets` does so for all that a builder raises.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` inside the block into its sentence on stderr and exit code 2; and an error that comes of a
    library newer than we know into a sentence about that and exit code 1."""
    try:
        yield
    except UserError as error:
        print(f"error: {error.sentence}", file=sys.stderr)
        sys.exit(EXIT_CODE_BAD_INPUT)
    except Exception as error:
        sentence = sentence_for(error)
        if sentence is None:
            ask_for_report_when_uncaught()
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(EXIT_CODE_FAILURE)
