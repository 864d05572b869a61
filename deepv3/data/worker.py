"""A tokenising child process: ``python -m deepv3.data.worker``, started by tokenise.Worker."""

from deepv3.data.tokenise import serve

if __name__ == "__main__":
    serve()
