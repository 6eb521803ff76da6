"""From what a row says of an image to where it is: a file that exists, or bytes that are a picture.

What may surprise:
* A path must stay inside the image folder, and an address is refused, unless the user allows it: a dataset from
  elsewhere could otherwise name any file of this computer, or have it call any server.
* A fetched picture is kept in the cache under its address and not fetched again.
"""

import base64
import binascii
import http.client
import os
import time
import urllib.error
import urllib.request
from hashlib import blake2b
from pathlib import Path
from typing import TypedDict
from urllib.parse import unquote, urlsplit

import datasets
from filelock import FileLock

from hf_llava_ft.data.image_folder import ImageFolder, MissingImageError, what_to_do_about_missing
from hf_llava_ft.data.pictures import decode_failure
from hf_llava_ft.data.values import EmbeddedImage, ImageRef
from hf_llava_ft.errors import UserError

# Of an encoded picture. A camera's largest JPEG has some 50 MB; a row of more would not pass through a JSON reader.
MAX_IMAGE_BYTES = 64 * 2**20
FETCH_TIMEOUT = 20  # seconds, for each wait
FETCH_DEADLINE = 120  # seconds in all: a server may send a byte now and then for ever

_SHOWN = 80  # characters of an address or a path in a message


class StoredImage(TypedDict):
    """An undecoded picture as a `datasets.Image` column holds it: `bytes`, or else the absolute `path` of a file."""

    path: str | None
    bytes: bytes | None


class ImageStore:
    """
    Args:
        image_folder (`str`, *optional*): folder that image paths are relative to; not needed for embedded images.
        allow_outside (`bool`): take absolute paths, `..` and links that leave the folder.
        allow_urls (`bool`): fetch http and https addresses.
        cache_dir (`str`, *optional*): where fetched pictures are kept; the cache of `datasets` by default.

    Attributes:
        real_folder (`str`): the folder without links; empty if there is none.

    Raises:
        UserError: if the folder is given and is none.
    """

    def __init__(
        self,
        image_folder: str | os.PathLike | None = None,
        allow_outside: bool = False,
        allow_urls: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.folder = None if image_folder is None else os.path.abspath(os.path.expanduser(image_folder))
        self.allow_outside = allow_outside
        self.allow_urls = allow_urls
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self._files = ImageFolder(self.folder)
        self.real_folder = self._files.real_path or ""

    def locate(self, image: ImageRef, place: str) -> StoredImage:
        """
        Find an image; it is not decoded.

        Args:
            image (`str` or `EmbeddedImage`): a path, a data, file, http or https address, or the picture itself.
            place (`str`): the row, for messages.

        Raises:
            UserError: if it is missing, not allowed, or not to be had.
        """
        if not isinstance(image, str):
            return self._embedded(image, place)
        scheme, separator, rest = image.partition(":")
        scheme = scheme.lower()
        if scheme == "data" and separator:
            return self._embedded(EmbeddedImage(path=None, bytes=_from_data_address(rest, place)), place)
        if scheme in ("http", "https") and rest.startswith("//"):
            return StoredImage(path=self._fetched(image, place), bytes=None)
        if scheme == "file" and rest.startswith("//"):
            image = unquote("/" + rest[2:].partition("/")[2])  # behind the name of the host, which is mostly none
        return StoredImage(path=self._file(image, place), bytes=None)

    def _file(self, name: str, place: str) -> str:
        if not self.allow_outside:
            return self._files.resolve(name, place)
        path = os.path.realpath(os.path.join(self.folder or os.getcwd(), name))
        if not os.path.isfile(path):
            raise MissingImageError(
                f"{place}: image {_short(name)} is no file; {what_to_do_about_missing(self.folder)}."
            )
        return path

    @staticmethod
    def _embedded(image: EmbeddedImage, place: str) -> StoredImage:
        size = len(image["bytes"])
        if not size:
            raise UserError(f"{place}: an image holds no bytes; replace it or remove the row.")
        if size > MAX_IMAGE_BYTES:
            raise UserError(
                f"{place}: an image has {size:,} bytes, and {MAX_IMAGE_BYTES:,} are the limit; make it smaller."
            )
        return StoredImage(path=image["path"], bytes=image["bytes"])

    def _fetched(self, url: str, place: str) -> str:
        if not self.allow_urls:
            raise UserError(
                f"{place}: image {_short(url)} is an address; download the file into the image folder and write its "
                "path, or allow fetching with --allow_image_urls."
            )
        root = Path(os.path.expanduser(self.cache_dir or datasets.config.HF_DATASETS_CACHE)) / "llava_fetched_images"
        kept = root / blake2b(url.encode(), digest_size=16).hexdigest()
        if not kept.exists():
            root.mkdir(parents=True, exist_ok=True)
            # One of the threads and processes fetches. 256 locks do: one each would be a file more for each picture.
            with FileLock(root / f"{kept.name[:2]}.lock"):
                if not kept.exists():
                    _fetch_into(kept, url, place)
        return str(kept)


def _fetch_into(kept: Path, url: str, place: str) -> None:
    content = _fetch(url, place)
    reason = decode_failure(content)  # before it is kept, so that a server's page of apology is not
    if reason is not None:
        raise UserError(
            f"{place}: image {_short(url)} can't be decoded ({reason}); check the address or remove the row."
        )
    unfinished = kept.with_suffix(".incomplete")
    unfinished.write_bytes(content)
    unfinished.replace(kept)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the web alone: `urllib` would follow one to ftp too."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.URLError(f"redirected to {urlsplit(newurl).scheme}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, place: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llava-ft"})
        with urllib.request.build_opener(_WebOnly).open(request, timeout=FETCH_TIMEOUT) as response:
            started, content = time.monotonic(), b""
            while len(content) <= MAX_IMAGE_BYTES and (more := response.read1(2**20)):
                content += more
                if time.monotonic() - started > FETCH_DEADLINE:
                    raise TimeoutError(f"it took more than {FETCH_DEADLINE} seconds")
    # ValueError and InvalidURL: an address that is none. HTTPException: a server that speaks no HTTP.
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        raise UserError(
            f"{place}: image {_short(url)} can't be fetched ({reason}); try again or remove the row."
        ) from (None)
    if len(content) > MAX_IMAGE_BYTES:
        raise UserError(f"{place}: image {_short(url)} has more than {MAX_IMAGE_BYTES:,} bytes; remove the row.")
    return content


def _from_data_address(rest: str, place: str) -> bytes:
    header, comma, encoded = rest.partition(",")
    if not comma or not header.lower().rstrip().endswith(";base64"):
        raise UserError(f"{place}: an image's data address is not base64; write data:image/png;base64,... .")
    try:
        # Line breaks are allowed in base64 and nothing else is.
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{place}: an image's data address is not valid base64; encode it again.") from None


def _short(name: str) -> str:
    shown = repr(name)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
