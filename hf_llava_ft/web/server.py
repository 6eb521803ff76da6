"""`llava-ft chat --web`: the page on a port, with nothing around it that calls home or serves files."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from hf_llava_ft.answering.shared_base import SharedBase
from hf_llava_ft.errors import UserError
from hf_llava_ft.serving.endpoint_handler import MAX_PICTURE_BYTES
from hf_llava_ft.web.access import checker, is_asked_by_another_site

OLDEST = "6.31"  # Gradio, as the extra `web` has it

# What a browser may load for the page, whatever somebody brings into it: what comes from here. Gradio's own styles and
# scripts stand within the page, and its framework builds functions of text.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


def check_extra() -> None:
    """
    Raises:
        UserError: if Gradio is not installed, or too old.
    """
    try:
        installed = version("gradio")
    except PackageNotFoundError:
        installed = "none"
    if installed == "none" or Version(installed) < Version(OLDEST):
        raise UserError(
            f"--web needs Gradio {OLDEST} or newer, and {installed} is installed: pip install 'hf-llava-ft[web]'."
        )


class AskedFromHere:
    """An ASGI application that other sites cannot have a browser ask, and whose answers have `_HEADERS`."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        if scope["type"] == "http" and is_asked_by_another_site(scope["method"], headers):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Another site asks, which this page does not answer."})
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                others = [each for each in message["headers"] if each[0].lower() not in _HEADERS]
                message = {**message, "headers": [*others, *_HEADERS.items()]}
            await send(message)

        await self.app(scope, receive, sent)


@contextmanager
def served(
    models: SharedBase,
    *,
    host: str,
    port: int,
    password: str | None,
    history: Path,
    system: str | None,
    generation: dict[str, Any],
) -> Iterator[str]:
    """
    The page, as long as the block lasts; gives its address. Uploads lie in a folder of this user alone, which goes in
    the end.
    """
    check_extra()
    # Whatever the environment says of shares, folders and proxies is for other pages.
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    # Gradio asks its own page before it gives the address; a proxy for the net does not lead there.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [direct, "localhost", "127.0.0.1", host]))
    host = f"[{host}]" if ":" in host else host  # as Gradio and addresses write IPv6
    with tempfile.TemporaryDirectory(prefix="llava-ft-chat-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # Gradio reads it when it is imported
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from hf_llava_ft.web.page import STYLE, build_page, theme

        page = build_page(models, Path(folder), history, system=system, generation=generation)
        around = [Middleware(AskedFromHere)]
        if not password:  # a page of elsewhere whose name points here all at once would be asked as if it were ours
            around.append(Middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost", "127.0.0.1"]))
        page.queue(max_size=16, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                auth=checker(password) if password else None,
                auth_message="Any user name, and the password of this page." if password else None,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                show_error=False,
                quiet=True,
                allowed_paths=[],
                max_file_size=MAX_PICTURE_BYTES,
                state_session_capacity=64,
                enable_monitoring=False,
                run_history=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                footer_links=[],
                theme=theme(),
                head=f"<style>{STYLE}</style>",  # of `css`, Gradio keeps what is within the columns alone
                app_kwargs={
                    "middleware": around,
                    "docs_url": None,
                    "redoc_url": None,
                    "openapi_url": None,
                },
            )
            yield address
        finally:
            page.close(verbose=False)


def serve(models: SharedBase, tell: Any, **settings: Any) -> None:
    """[`served`] until Ctrl-C or a signal; `tell` is given the lines about it."""
    with served(models, **settings) as address:
        tell(f"The page is at {address}; Ctrl-C ends it.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            tell("The page was ended.")
