# What the toolkit needs, and Jupyter; the toolkit itself is mounted, as the README's "In Jupyter" shows. On x86-64 the
# wheels of torch bring CUDA, so that the same image runs with and without a GPU. The full Python image has the C++
# compiler that [train] compile wants.
FROM python:3.12

COPY requirements.txt /tmp/
RUN pip install --no-cache-dir --requirement /tmp/requirements.txt jupyterlab

# A user without a name or a home, as docker run --user makes one, can write here.
ENV HOME=/tmp
WORKDIR /toolkit
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--allow-root"]
