"""A web application that answers with images, in Flask.

    pip install flask
    flask --app examples/web_app.py run
    curl "localhost:5000/image.png?label=noto/flags&seed=3&steps=20" --output flag.png

One Sampler serves all threads of a process. Behind a server that forks, each worker loads its own,
at its first request: see docs/applications.md.
"""

import io
from functools import cache

from flask import Flask, Response, request
from PIL import Image

from runtime import RequestError, Sampler

app = Flask(__name__)
MAX_STEPS = 100


@cache
def sampler() -> Sampler:
    return Sampler.load("emoji32", max_batch=4)


@app.get("/image.png")
def image() -> Response:
    label = request.args.get("label")
    seed = request.args.get("seed", 0, type=int)
    steps = min(request.args.get("steps", 20, type=int), MAX_STEPS)
    pixels = sampler().pictures(1, seed=seed, label=label, steps=steps)[0]

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    # The same request gives the same bytes, so caches may keep the image.
    headers = {"Cache-Control": "public, max-age=86400"}
    return Response(file.getvalue(), mimetype="image/png", headers=headers)


@app.errorhandler(RequestError)
def invalid(error: RequestError) -> tuple[dict[str, str], int]:
    """The error names the parameter, its rule and the value received."""
    return {"error": str(error)}, 400
