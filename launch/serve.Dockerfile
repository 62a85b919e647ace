# The page on a CPU: docker build -f launch/serve.Dockerfile -t msr-serve . && docker run -p 8000:8000 msr-serve
FROM python:3.12-slim
WORKDIR /msr
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY msr_jax msr_jax
COPY data_prep data_prep
COPY configs configs
# The lock's versions, of what `[web]` needs.
RUN grep -v '^tinysoundfont' requirements.lock > run.lock && pip install --no-cache-dir -c run.lock '.[web]' \
  && useradd --create-home msr
USER msr
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["msr", "serve", "--host", "0.0.0.0"]
