# docker build -t unnoise .
# docker run --rm -p 8000:8000 unnoise
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE NOTICE ./
COPY runtime runtime
COPY serve serve
# The wheel holds a copy of it, which `emoji32` names.
COPY bundles/emoji32 bundles/emoji32
RUN pip install --no-cache-dir --constraint constraints.txt '.[cpu,serve]'

RUN useradd --create-home unnoise
USER unnoise
WORKDIR /home/unnoise

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["unnoise", "serve", "--host", "0.0.0.0", "--port", "8000"]
# --open lets everybody use the published port; with --token-file FILE only users with a token may.
# Your own bundle: docker run -v ./bundles/mine:/mine unnoise /mine --open
CMD ["emoji32", "--open"]
