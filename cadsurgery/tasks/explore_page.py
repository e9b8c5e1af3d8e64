"""The page of `cadsurgery explore`: an image, the settings of a mask, and what they do. Needs Gradio.

It is served to this machine alone, and loads nothing from other hosts.
"""

from __future__ import annotations

import atexit
import html
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from cadsurgery.data.images import SUFFIXES
from cadsurgery.support.errors import CadError, import_optional
from cadsurgery.support.progress import Step
from cadsurgery.tasks.commands import ExploreOptions
from cadsurgery.tasks.explorer import (
    BUDGET,
    LIMITS,
    SAMPLES,
    THRESHOLD,
    PageSettings,
    Subject,
    explore,
    masks_with_threshold,
    open_subject,
)

HOST = "127.0.0.1"
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# Browsers refuse every request of the page to another host.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def serve(model: str, options: ExploreOptions, step: Step) -> str:
    """Open a network and serve its page in a thread of its own; return the address.

    Raises:
        CadError: Gradio is not installed, the network cannot be opened, or no port is free.
    """
    _gradio()
    step(f"opening {model}")
    subject = open_subject(model, options.weights, options.device, options.trust)
    step("starting the page")
    try:
        _, address, _ = launch(make_page(subject))
    except OSError as error:
        raise CadError(
            "the page cannot be served.", why=str(error), next="free a port, and try again."
        ) from error
    return str(address)


def launch(page: Any) -> tuple[Any, str, str]:
    """Serve a page to this machine alone, on a free port; return the application and its address."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(_Policy)]
    launched: tuple[Any, str, str] = page.launch(
        server_name=HOST,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size="32mb",
        theme=_gradio().themes.Base(**_FONTS),
        app_kwargs={"middleware": middleware},
    )
    return launched


class _Policy:
    """Adds the content security policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@cache
def uploads() -> str:
    """Return the folder of uploaded images of this process, which is deleted when it ends."""
    folder = tempfile.mkdtemp(prefix="cadsurgery-explore-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _gradio() -> Any:
    """Import Gradio without its analytics, and with a folder of uploads of its own.

    Raises:
        NotInstalled: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = uploads()
    return import_optional("gradio", "the page needs Gradio.", "pip install 'cadsurgery[explore]'")


def make_page(subject: Subject, rounds: int = 3) -> Any:
    """Return the page of a network, a `gradio.Blocks`; one computation runs at a time."""
    gr = _gradio()
    thresholds = masks_with_threshold()
    pairs = {f"{high} to {low}": (high, low) for high, low in subject.strides}
    samples = {f"street {seed + 1}": seed for seed in SAMPLES}
    default = gr.Progress()

    def limit_to(mask: str, limit: str) -> list[Any]:
        usual = thresholds.get(mask, 1.0)
        return [
            gr.Slider(maximum=4 * usual, value=usual, visible=limit == THRESHOLD),
            gr.Slider(visible=limit == BUDGET),
        ]

    def show(
        file: str | None, sample: str, mask: str, limit: str, threshold: float, budget: float, pair: str, fill: str,
        progress: Any = default,
    ) -> list[Any]:  # fmt: skip
        def step(
            text: str, done: float | None = None, of: float | None = None, limit: float | None = None
        ) -> None:
            progress(done / of if done is not None and of else None, desc=text)

        value = {THRESHOLD: threshold, BUDGET: budget}.get(limit, 0.0)
        setting = PageSettings("" if mask == subject.mask else mask, limit, value, pairs[pair], fill)
        try:
            result = explore(subject, Path(file) if file else samples[sample], setting, rounds, step)
        except CadError as error:
            text = html.escape(str(error)).replace("\n", "<br>")
            raise gr.Error(text, duration=None, print_exception=False) from error
        whole = result.rows[0].macs or result.rows[-1].macs
        table = [
            [row.side, f"{row.macs:.3e}", f"{row.macs / whole:.2f}", _milliseconds(row.milliseconds)]
            for row in result.rows
        ]
        is_map = result.prediction is not None
        both = gr.ImageSlider((result.prediction, result.dense) if is_map else None, visible=is_map)
        pictures = [both, result.level_map, result.lattice]
        return [*pictures, "\n".join(result.lines), table, result.python, result.command]

    with gr.Blocks(title="cadsurgery explore", delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# What does a mask do?\n{html.escape(subject.words)}")
        with gr.Row():
            inputs, button = _add_inputs(subject, [*thresholds], [*pairs], [*samples])
            outputs = _add_outputs()
        file, sample, mask, limit, threshold, budget, pair, fill = inputs
        changes = [threshold.release, budget.release, sample.input, fill.input, pair.input, file.upload]
        gr.on(
            [button.click, *changes],
            show,
            inputs,
            outputs,
            trigger_mode="always_last",
            concurrency_limit=1,
            api_name="show",
        )
        gr.on(
            [mask.change, limit.change], limit_to, [mask, limit], [threshold, budget], show_progress="hidden"
        )
    return page


def _add_inputs(
    subject: Subject, masks: list[str], pairs: list[str], samples: list[str]
) -> tuple[list[Any], Any]:
    """Add the column of settings to a page; return its fields and its button."""
    gr, masks = _gradio(), list(dict.fromkeys((subject.mask, *masks)))
    with gr.Column(scale=1, min_width=280):
        fields = [
            gr.File(label="your image", file_types=list(SUFFIXES), type="filepath", height=120),
            gr.Radio(samples, value=samples[0], label="without an image of yours: a sample"),
            gr.Dropdown(masks, value=masks[0], label="mask", allow_custom_value=True),
            gr.Radio(list(LIMITS), value=BUDGET, label="limit of the mask"),
            gr.Slider(0, 4, 1, step=0.01, label="threshold", visible=False),
            gr.Slider(0, 1, 0.3, step=0.01, label="budget: share of the patches kept high"),
            gr.Dropdown(pairs, value=pairs[0], label="output stride, high to low"),
            gr.Radio(list(subject.fills), value=subject.fills[0], label="fill"),
        ]
        return fields, gr.Button("Show", variant="primary")


def _add_outputs() -> list[Any]:
    """Add the column of results to a page; return its fields."""
    gr, buttons = _gradio(), ["download", "fullscreen"]  # without sharing on other hosts
    with gr.Column(scale=3):
        both = gr.ImageSlider(label="prediction with the mask | everything high", format="png")
        with gr.Row():
            level_map = gr.Image(label="level map: red is kept high", format="png", buttons=buttons)
            lattice = gr.Image(label="lattice: one element per cell", format="png", buttons=buttons)
        words = gr.Textbox(label="results", lines=4)
        table = gr.Dataframe(headers=["whole network", "MACs", "of the first", "ms"], label="cost")
        with gr.Tab("copy as Python"):
            python = gr.Code(language="python", label="Python", interactive=False)
        with gr.Tab("copy as command"):
            command = gr.Code(language="shell", label="command", interactive=False)
    return [both, level_map, lattice, words, table, python, command]


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
