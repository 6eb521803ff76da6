"""From the name of an image in a row to a file in the image folder.

An image must lie inside the folder once `..` and symbolic links are followed: a dataset from elsewhere could name any
file of this computer otherwise. Absolute paths are refused even when they point inside, since they tie the data to one
computer.
"""

import os
import stat

from hf_llava_ft.errors import UserError


class ImageAddressError(UserError):
    """An image is given by an address, of the web or one that holds the picture itself, where a path is read."""


class MissingImageError(UserError):
    """An image's file is not there."""


def what_to_do_about_missing(folder: str | None) -> str:
    """Where nobody said where images are, that comes first."""
    is_given = folder is not None and os.path.realpath(folder) != os.path.realpath(os.getcwd())
    where = "" if is_given else "name the folder that the images are in with --image_folder, "
    return f"{where}add the file or remove the row"


class ImageFolder:
    """
    The folder that image paths of a data file are relative to.

    Args:
        folder (`str`, *optional*): None if the data has no images.

    Raises:
        UserError: if it is given and is no folder.
    """

    def __init__(self, folder: str | None):
        if folder is not None and not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder; give the one that the data's image paths are relative to.")
        self.folder = folder
        self.real_path = None if folder is None else os.path.realpath(folder)
        # Files share few directories: resolving these once leaves one lstat per file.
        self._real_directories: dict[str, str] = {}

    def resolve(self, name: str, place: str) -> str:
        """
        The real path of image `name`.

        Args:
            name (`str`): as the row has it.
            place (`str`): the row, for messages.

        Returns:
            `str`: absolute, free of links.

        Raises:
            UserError: if there is no such file, or it lies outside the folder.
        """
        image = f"{place}: image {name!r}"
        if "://" in name or name.startswith("data:"):
            raise ImageAddressError(
                f"{image} is an address; download the file into the image folder and write its path."
            )
        if self.real_path is None:
            raise UserError(f"{image} has no folder to be looked up in; give the image folder.")
        if os.path.isabs(name):
            raise UserError(
                f"{image} is an absolute path; write it relative to the image folder {self.folder}, "
                "or allow it with --allow_images_outside."
            )
        try:
            directory, base = os.path.split(os.path.join(self.real_path, name))
            if directory not in self._real_directories:
                self._real_directories[directory] = os.path.realpath(directory)
            path = os.path.join(self._real_directories[directory], base)
            found = _found(path)
            if base == ".." or (found is not None and stat.S_ISLNK(found.st_mode)):
                path, found = os.path.realpath(path), None
            # Before any look at the file itself: whether something outside exists is nobody's business.
            if not path.startswith(os.path.join(self.real_path, "")):
                raise UserError(
                    f"{image} leaves the image folder {self.folder} (through '..' or a link); "
                    "copy the file into it, give the folder that holds all images, or allow it with "
                    "--allow_images_outside."
                )
            mode = (found or os.stat(path)).st_mode
        except FileNotFoundError:
            raise MissingImageError(
                f"{image} is missing from {self.folder}; {what_to_do_about_missing(self.folder)}."
            ) from None
        except OSError as error:
            raise UserError(f"{image} can't be opened in {self.folder} ({error.strerror}); check it.") from None
        if not stat.S_ISREG(mode):
            raise UserError(f"{image} is not a file; give the path of a picture in {self.folder}.")
        return path


def _found(path: str) -> os.stat_result | None:
    """The state of what lies there, be it a link; None where nothing can be said of it yet."""
    try:
        return os.lstat(path)
    except (OSError, ValueError):
        return None
