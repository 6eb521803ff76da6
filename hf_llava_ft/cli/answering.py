"""`llava-ft generate | chat`: questions to a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_llava_ft.cli.application import (
    AllowNanOption,
    AttentionOption,
    BaseOption,
    BitsOption,
    ColumnsOption,
    DeviceOption,
    DtypeOption,
    ImagesOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    RevisionOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    app,
    write_json,
)
from hf_llava_ft.errors import UserError, exit_on_user_error
from hf_llava_ft.start_up import importing, leave_out_bitsandbytes


@app.command()
def generate(
    model: ModelOption,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The question.")] = None,
    image: ImagesOption = None,
    data_path: Annotated[
        str | None,
        typer.Option("--data_path", help="Rows to answer, in any format that training reads, instead of --prompt."),
    ] = None,
    image_folder: Annotated[str, typer.Option("--image_folder", help="Folder that their image paths start from.")] = (
        "."
    ),
    columns: ColumnsOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON Lines with the answers to --data_path; goes on if begun.")
    ] = None,
    allow_images_outside: Annotated[
        bool, typer.Option("--allow_images_outside", help="Allow image paths that leave the image folder.")
    ] = False,
    allow_image_urls: Annotated[bool, typer.Option("--allow_image_urls", help="Fetch images from the web.")] = False,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Rows of --data_path at a time.")] = 16,
    base: BaseOption = None,
    revision: RevisionOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    dtype: DtypeOption = "auto",
    bits: BitsOption = None,
    device: DeviceOption = None,
    attn_implementation: AttentionOption = "sdpa",
    allow_nan: AllowNanOption = False,
    json_file: JsonOption = None,
) -> None:
    """Answer one question about any number of pictures, as a stream; or those of a whole dataset, into a file."""
    loading: dict[str, Any] = {"base": base, "revision": revision, "dtype": dtype, "bits": bits, "device": device}
    loading |= {"attn_implementation": attn_implementation, "allow_nan": allow_nan}
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    with exit_on_user_error():
        if (prompt is None) == (data_path is None):
            raise UserError("generate answers either --prompt or the rows of --data_path: give one of them.")
        if data_path is None:
            if output is not None:
                raise UserError("--output is for the answers to --data_path; --json writes the answer to --prompt.")
            _answer_one(model, str(prompt), image or [], system, loading, generation, json_file)
            return
        if image or output is None:
            wrong = "--image goes with --prompt; rows name their own" if image else "--data_path needs --output"
            raise UserError(f"{wrong}: llava-ft generate --model M --data_path rows.json --output answers.jsonl.")
        _leave_out_bitsandbytes(model, loading)
        with importing():
            from hf_llava_ft.answering.files import answer_file

        done = answer_file(
            model,
            data_path,
            output,
            image_folder,
            system=system,
            batch_size=batch_size,
            loading=loading,
            columns=columns,
            access={"allow_outside": allow_images_outside, "allow_urls": allow_image_urls},
            **generation,
        )
        write_json(json_file, {"output": str(output), "answered": done.num_answered, "failed": done.num_failed})
        if done.num_failed:
            raise typer.Exit(1)


def _leave_out_bitsandbytes(model: str, loading: dict[str, Any]) -> None:
    if loading["bits"] is None:
        leave_out_bitsandbytes([model, loading["base"]])


def _answer_one(
    model: str,
    prompt: str,
    image: list[str],
    system: str | None,
    loading: dict[str, Any],
    generation: dict[str, Any],
    json_file: Path | None,
) -> None:
    parts, images = _load(model, image, loading, generation)
    from hf_llava_ft.answering.conversation import Conversation

    answer = ""
    for piece in Conversation(parts[0], parts[1], system).stream(prompt, images, **generation):
        answer += piece
        typer.echo(piece, nl=False)
    typer.echo("")
    write_json(json_file, {"prompt": prompt, "images": image, "answer": answer.strip()})


def _load(model: str, image: list[str], loading: dict[str, Any], generation: dict[str, Any]) -> tuple[Any, list]:
    """(model and processor, pictures); what is wrong with settings and pictures is said before a model is loaded."""
    _leave_out_bitsandbytes(model, loading)
    with importing():
        from hf_llava_ft.answering.loading import answering_device, load_for_answering
        from hf_llava_ft.answering.pictures import open_image
        from hf_llava_ft.answering.prompts import sampling_options
        from hf_llava_ft.checkpoints.opening import load_processor

    sampling_options(generation["temperature"], generation["top_p"])
    answering_device(loading["device"])
    processor = load_processor(model, loading["revision"], base=loading["base"])
    images = [open_image(source, processor.picture_opening) for source in image]
    return load_for_answering(model, processor=processor, **loading), images


@app.command()
def chat(
    model: ModelOption,
    image: ImagesOption = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    dtype: DtypeOption = "auto",
    bits: BitsOption = None,
    device: DeviceOption = None,
    attn_implementation: AttentionOption = "sdpa",
    allow_nan: AllowNanOption = False,
    web: Annotated[
        bool, typer.Option("--web", help="On a page in the browser (extra `web`), with the models side by side.")
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="With --web: another adapter of the same base, to switch to; may be repeated."),
    ] = None,
    history: Annotated[
        Path | None, typer.Option("--history", help="With --web: LLaVA JSON that kept talks go to [talks.json].")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="With --web: address to listen at [127.0.0.1]; others need LLAVA_FT_PASSWORD."),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="With --web: port to listen at [7860].")
    ] = None,
) -> None:
    """Chat with a model about pictures. In the chat: /image, /retry, /compare, /save, /new, /help, /quit."""
    loading: dict[str, Any] = {"base": base, "revision": revision, "dtype": dtype, "bits": bits, "device": device}
    loading |= {"attn_implementation": attn_implementation, "allow_nan": allow_nan}
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    with exit_on_user_error():
        of_the_page = {"adapter": adapter, "history": history, "host": host, "port": port}
        if web:
            _chat_on_a_page(model, image, system, loading, generation, of_the_page)
            return
        for flag, value in of_the_page.items():
            if value is not None:
                raise UserError(f"--{flag} is for the page: add --web.")
        parts, images = _load(model, image or [], loading, generation)
        from hf_llava_ft.answering.chat import HELP, Chat
        from hf_llava_ft.answering.shared_base import SharedBase
        from hf_llava_ft.checkpoints.inspection import inspect_checkpoint

        def write(piece: str) -> None:
            typer.echo(piece, nl=False)

        def tell(line: str) -> None:
            typer.echo(line, err=True)

        models = SharedBase(parts[0], parts[1], inspect_checkpoint(model, revision, base), revision)
        talk = Chat(models, images, system=system, write=write, tell=tell, **generation)
        tell(HELP)
        goes_on = True
        while goes_on:
            try:
                line = input("you: ")
            except (EOFError, KeyboardInterrupt):
                typer.echo("")
                return
            goes_on = talk.take(line)


def _chat_on_a_page(
    model: str,
    image: list[str] | None,
    system: str | None,
    loading: dict[str, Any],
    generation: dict[str, Any],
    of_the_page: dict[str, Any],
) -> None:
    """What is wrong with the page is said before a model is loaded."""
    if image:
        raise UserError("--image is for the terminal: drop pictures on the page.")
    _leave_out_bitsandbytes(model, loading)
    with importing():
        from hf_llava_ft.web.access import check_free, password_for
        from hf_llava_ft.web.server import check_extra, serve

    check_extra()
    host, port = of_the_page["host"] or "127.0.0.1", of_the_page["port"] or 7860
    history = of_the_page["history"] or Path("talks.json")
    if history.suffix != ".json":
        raise UserError(f"--history {history} does not end in .json, as a file of rows does; choose another name.")
    password = password_for(host)
    check_free(host, port)
    parts, _ = _load(model, [], loading, generation)
    from hf_llava_ft.answering.shared_base import SharedBase
    from hf_llava_ft.checkpoints.inspection import inspect_checkpoint

    revision = loading["revision"]
    models = SharedBase(parts[0], parts[1], inspect_checkpoint(model, revision, loading["base"]), revision)
    for adapter in of_the_page["adapter"] or []:
        models.add(adapter, loading["base"])
    page: dict[str, Any] = {"host": host, "port": port, "password": password, "history": history}
    serve(models, lambda line: typer.echo(line, err=True), system=system, generation=generation, **page)
