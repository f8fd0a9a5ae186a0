# A service that answers aerial images with roads, buildings and masks; see nbs/scenes/serve.ipynb.
#   docker build -t aerial_serve .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/models/town:/models/town:ro" aerial_serve /models/town
# The port is published to this machine only: the service has no password.
FROM python:3.12-slim

# libexpat1: rasterio's GDAL links to it; libgomp1: torch and numba
RUN apt-get update && apt-get install -y --no-install-recommends libexpat1 libgomp1 && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv \
    && useradd --create-home --uid 10001 aerial

WORKDIR /app
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 PATH=/app/.venv/bin:$PATH \
    NUMBA_CACHE_DIR=/home/aerial/.cache/numba PYTHONUNBUFFERED=1

# what changes seldom first, so that an edit of the package does not install everything again
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN uv sync --frozen --no-dev --extra serve --no-install-project
COPY aerial_nb ./aerial_nb
RUN uv sync --frozen --no-dev --extra serve

USER aerial
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import json, urllib.request as u; assert json.load(u.urlopen('http://127.0.0.1:8000/health', timeout=4))['ready']"]

# inside a container 127.0.0.1 is the container alone; models come behind
ENTRYPOINT ["aerial_serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
