# An image for TPU hosts, which launch/jobset.yaml runs: the packages of the lock file, and gcsfs for gs:// paths.
#   docker build --build-arg REVISION=$(git rev-parse --short=12 HEAD) --tag IMAGE .
#   docker run --rm IMAGE --version
FROM python:3.11-slim
WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps -r requirements.lock
COPY setup.cfg pyproject.toml README.md LICENSE NOTICE ./
COPY univg_jax ./univg_jax
COPY data_pipelines ./data_pipelines
COPY experiments ./experiments
RUN pip install --no-cache-dir --constraint requirements.lock '.[tpu,gcs]'

# Where a command runs: `--config=experiments/...` is found here, and `runs/` can be written.
WORKDIR /home/univg
COPY experiments ./experiments
RUN useradd --uid 1000 --home-dir /home/univg univg && chown univg:univg .
USER univg
# Last, since it changes with every commit. `univg --version` and reports show it.
ARG REVISION=""
ENV UNIVG_REVISION=$REVISION
ENTRYPOINT ["univg"]
CMD ["--help"]
