"""Tokenises a run's data ahead of it: ``python launch/prepare_data.py +config=NAME [key=value ...]``, without a GPU.

Trains the tokenizer if the config names none, and writes memory-mapped Arrow files under data.cache_dir. Interrupted,
it goes on where it was; the run then finds the work done. Bad documents are named and counted, and stop nothing unless
data.bad_documents=stop. Streaming sources are opened and checked only.
"""

from deepv3.config.cli import main


def prepare_data(cfg) -> None:
    """Prepare, and say what came out."""
    from deepv3.data.prepare import prepare

    for line in prepare(cfg).describe():
        print(line)


if __name__ == "__main__":
    main(prepare_data)
