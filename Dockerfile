# ZeroSeg's server for OHIF and 3D Slicer on a CPU, for compose.yaml. It has no login: never publish its port by itself.
#
#     docker compose up --build
#
# Not built where this was written, which has no Docker daemon; the steps are those of `make install`, which is tested there.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 10001 zeroseg
WORKDIR /opt/zeroseg

# torch goes first and alone, from its CPU index: asked for by another package it pulls gigabytes of CUDA libraries.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0

COPY pyproject.toml hatch_build.py README.md LICENSE requirements.txt requirements-no-deps.txt ./
COPY bundle bundle
RUN pip install --no-cache-dir --constraint requirements.txt ".[app]" \
    && pip install --no-cache-dir --no-deps -r requirements-no-deps.txt
COPY monailabel_app monailabel_app
# MONAI Label makes these beside the app when they are missing.
RUN mkdir -p monailabel_app/model monailabel_app/bin monailabel_app/logs && chown zeroseg monailabel_app/logs

# Studies that were fetched, labels, trained heads and sessions are patients' data: they lie in one volume, and nowhere else.
ENV ZEROSEG_APP=/opt/zeroseg/monailabel_app \
    HF_HUB_OFFLINE=1 \
    MONAI_LABEL_DICOMWEB_CACHE_PATH=/data/dicom \
    MONAI_LABEL_SESSION_PATH=/data/sessions
RUN mkdir -p /data && chown zeroseg /data
VOLUME /data
USER zeroseg

EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=120s --timeout=10s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/info/', timeout=9)"]
ENTRYPOINT ["zeroseg", "serve", "--host", "0.0.0.0"]
CMD ["--studies", "http://orthanc:8042/dicom-web"]
