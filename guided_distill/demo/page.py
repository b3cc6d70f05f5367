"""The page: a `Player`'s pictures by Gradio's sliders. One picture is drawn at a time, and who waits is told so."""

import base64
import functools
import html
import random

import gradio as gr
import numpy as np

from guided_distill import pictures
from guided_distill.demo.player import MAX_SEED, NUM, Settings, enlarged
from guided_distill.errors import UserError

WAITING = 32  # who may wait at most; the next one is told that the queue is full
_KEPT = 600  # seconds that pictures that were brought along are kept on the disk
_UPLOAD = "16mb"
_CSS = """
.figures { display: flex; flex-wrap: wrap; gap: 24px; }
.figures figure { margin: 0; }
.figures img { display: block; min-width: 276px; image-rendering: pixelated; }
.figures figcaption { margin-top: 6px; font-size: 15px; }
"""
_ABOUT = """# {title}

{num} pictures of one class, guidance strength w and seed, each from a noise of its own; w = 0 is no guidance.
"""
# Gradio's page may take the stream of the server's answers for open while the server is closing it after another
# drawing; what was asked for then never comes, and the page waits. The next question opens the stream: this asks one
# every three seconds for as long as the page waits. Who is seen waiting in the queue is being answered.
_AWAIT_ANSWER = """() => {
  let looks = 2;  // one may fall between two drawings
  const look = () => {
    const status = document.querySelector('#status');
    const tracker = status.querySelector('[data-testid=status-tracker]:not(.hide)');
    const waits = tracker && !tracker.querySelector('.error');  // which stays there
    if (waits && !/queue: [0-9]/.test(status.innerText)) document.querySelector('#ask_again').click();
    looks = waits ? 2 : looks - 1;
    if (!looks) clearInterval(window.askAgain);
  };
  clearInterval(window.askAgain);
  window.askAgain = setInterval(look, 3000);
}"""
_QUEUE = f"One is drawn at a time; whoever else asks waits in a queue of at most {WAITING}, and sees the place here."


def build(player):
    """The page of a Player, as gradio.Blocks."""
    draw = _of_one_queue(functools.partial(_draw, player))
    with gr.Blocks(title=player.title, analytics_enabled=False, delete_cache=(_KEPT, _KEPT), fill_width=True) as page:
        gr.Markdown(_ABOUT.format(title=html.escape(player.title), num=NUM))
        with gr.Row():
            with gr.Column(min_width=320):
                settings, another = _settings(player)
                status = gr.Markdown(_QUEUE, elem_id="status")
            with gr.Column(scale=3):
                with gr.Tab("From noise"):
                    there = player.teacher is not None
                    beside = gr.Checkbox(there, label="the teacher's beside", visible=there, elem_id="beside")
                    drawn = gr.HTML(elem_id="drawn")
                if player.editors:
                    with gr.Tab("From a picture"):
                        _tab_of_a_picture(player, settings, status, masked=False)
                    with gr.Tab("Fill in"):
                        _tab_of_a_picture(player, settings, status, masked=True)
        student, w, label, seed = settings
        moves = [student.input, w.input, label.input, seed.change, beside.input]
        gr.on(moves, js=_AWAIT_ANSWER, api_visibility="private")
        gr.on([page.load, *moves], inputs=[*settings, beside], outputs=drawn, api_name="draw", **draw,
              show_progress_on=status, trigger_mode="always_last")  # fmt: skip
        ask_again = gr.Button(elem_id="ask_again", visible="hidden")
        ask_again.click(lambda: None, api_visibility="private", show_progress="hidden", trigger_mode="multiple")
        another.click(lambda: random.randrange(MAX_SEED), outputs=seed, queue=False, api_visibility="private")
    return page


def serve(page, host, port):
    """Serves the page until it is interrupted. Raises UserError where the port is taken or the host not ours."""
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    print(f"http://{host}:{port}", flush=True)
    try:
        # Without node, monitoring or links to elsewhere; those fonts are here already.
        page.launch(server_name=host, server_port=port, share=False, quiet=True, max_file_size=_UPLOAD, ssr_mode=False,
                    footer_links=[], enable_monitoring=False, theme=theme, css=_CSS)  # fmt: skip
    except OSError as error:
        raise UserError(f"--host={host} --port={port} cannot be listened to ({error}); name another port") from error


def _settings(player):
    """([student, w, label, seed], the button for another seed)."""
    low, high = player.w_range
    several = len({student.series for student in player.students.values()}) > 1
    steps = [(f"{s.num_steps} ({s.series})" if several else f"{s.num_steps}", n) for n, s in player.students.items()]
    classes = [(str(k), k) for k in range(player.num_classes)]
    label = gr.Dropdown(classes, value=0, label="class", elem_id="class")
    w = gr.Slider(low, high, value=min(max(1.0, low), high), label="w, the guidance strength", elem_id="w")
    student = gr.Radio(steps, value=steps[-1][1], label="steps", elem_id="steps")
    seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
    another = gr.Button("another seed", elem_id="another")
    return [student, w, label, seed], another


def _tab_of_a_picture(player, settings, status, masked):
    kind = "fill" if masked else "edit"
    with gr.Row():
        with gr.Column():
            if masked:
                brush = gr.Brush(default_size=24, colors=["#ff3030"], color_mode="fixed")
                given = gr.ImageEditor(type="pil", label="paint what is to be made anew", brush=brush, layers=False,
                                       sources=["upload", "clipboard"], transforms=(), height=420,
                                       elem_id="painted")  # fmt: skip
            else:
                given = gr.Image(type="pil", image_mode="RGB", label="a picture", sources=["upload", "clipboard"],
                                 height=340, elem_id="picture")  # fmt: skip
            take = gr.Button("take one from the noise", elem_id=f"{kind}_take")
        with gr.Column():
            student = settings[0]
            most = player.students[student.value].num_steps
            start = gr.Slider(1, most, value=most if masked else max(1, most // 2), step=1, elem_id=f"{kind}_start",
                              label="steps from it: the fewer, the more of it is kept")  # fmt: skip
            go = gr.Button("make others of it", variant="primary", elem_id=f"{kind}_go")
            made = gr.HTML(elem_id=f"{kind}_made")
    student.change(functools.partial(_start, player, masked), student, start, queue=False, api_visibility="private")
    take.click(inputs=settings, outputs=given, api_visibility="private",
               **_of_one_queue(functools.partial(_first, player)), show_progress_on=status)  # fmt: skip
    gr.on([take.click, go.click], js=_AWAIT_ANSWER, api_visibility="private")
    edit = functools.partial(_fill, player) if masked else functools.partial(_edit, player)
    go.click(inputs=[*settings, given, start], outputs=made, api_name=kind, **_of_one_queue(edit),
             show_progress_on=status)  # fmt: skip


def _of_one_queue(function):
    # All that uses the network shares one place, so that the others wait in the queue and not in the processor.
    return {"fn": function, "concurrency_id": "network", "concurrency_limit": 1}


def _said(function):
    """A user's mistake as Gradio shows it."""

    @functools.wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def _draw(player, student, w, label, seed, beside):
    """The student's pictures at once, the teacher's when they are there."""
    settings = Settings(student, w, label, seed)
    drawn = _said(player.draw)(settings)
    yield _figures(drawn)
    if beside and player.teacher is not None:
        yield _figures(drawn, _said(player.draw_by_teacher)(settings))


def _first(player, *settings):
    x = pictures.to_uint8(_said(player.draw)(Settings(*settings)).x[0])
    return enlarged(np.broadcast_to(x, (*x.shape[:2], 3)))


def _start(player, masked, name):
    most = player.students[name].num_steps
    return gr.Slider(maximum=most, value=most if masked else max(1, most // 2))


def _edit(player, student, w, label, seed, picture, start):
    return _figures(_said(player.edit)(Settings(student, w, label, seed), picture, start))


def _fill(player, student, w, label, seed, drawn, start):
    picture, layers = (drawn or {}).get("background"), (drawn or {}).get("layers") or []
    if picture is None or not layers:
        raise gr.Error("picture: there is none yet, or nothing is painted", print_exception=False)
    mask = layers[0].getchannel("A")
    return _figures(_said(player.edit)(Settings(student, w, label, seed), picture.convert("RGB"), start, mask))


def _figures(*several):
    """Pictures with their captions, within the page: nothing is left on the disk."""
    figures = []
    for drawn in several:
        png = base64.b64encode(pictures.png_bytes(drawn.picture)).decode()
        caption = html.escape(drawn.caption)
        image = f'<img src="data:image/png;base64,{png}" alt="{caption}">'
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="figures">{"".join(figures)}</div>'
