# docker build -t unnoise .
# docker run --rm -p 8000:8000 unnoise
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY runtime runtime
COPY serve serve
RUN pip install --no-cache-dir --constraint constraints.txt '.[cpu,serve]'

COPY bundles/emoji32 /bundles/emoji32

RUN useradd --create-home unnoise
USER unnoise
WORKDIR /home/unnoise

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["unnoise", "serve", "--host", "0.0.0.0", "--port", "8000"]
# Whoever can reach the published port may use it. With --token-file instead of --open, only users
# with a token may.
CMD ["/bundles/emoji32", "--open"]
