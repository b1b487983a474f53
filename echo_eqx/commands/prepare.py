"""Turn recordings and their transcripts into shards of latents to train on.

    echo-eqx prepare --input recordings/ --output shards/ --codec WEIGHTS
    echo-eqx prepare --input clips.jsonl --output shards/ --codec WEIGHTS --part 2/8

The input is a folder of audio with a NAME.txt for each NAME.wav, a JSONL manifest, a table (as in
LJSpeech, Common Voice, F5-TTS, XTTS, VITS and others), tars of audio and JSON, or a Hugging Face
audio dataset in Parquet. Run the same command again to continue where it stopped, or on several
machines with --part to share the work.
"""

import echo_eqx
from echo_eqx.cli import parse
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.errors import EchoError, printable
from echo_eqx.files import remove_temporary_files
from echo_eqx.prepare.make import CODEC, SILENCE, PrepareConfig, describe_codec, make_dataset
from echo_eqx.prepare.push import push


def main() -> None:
    config = parse(PrepareConfig, __doc__)
    config.check()
    assert config.output is not None
    use_compilation_cache()
    try:
        if config.input is not None or config.push is None:
            codec = echo_eqx.load_codec(config.codec)
            if config.input is not None:
                make_dataset(config, codec, config.input, config.output)
            else:
                config.output.mkdir(parents=True, exist_ok=True)
                remove_temporary_files(config.output, {SILENCE, CODEC})
                describe_codec(codec, config.output)
                print(f"{printable(str(config.output / SILENCE))}; to make shards, give --input")
    except OSError as error:
        raise EchoError(f"{config.output} cannot be written: {error.strerror}") from None
    if config.push is not None:
        push(config.output, config.push)
