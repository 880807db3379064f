#!/usr/bin/env python
"""Tokenize text files into the shards that pretraining reads; run it again to do what is missing."""

from __future__ import annotations

import os
import sys

from megatron_iiet.config.errors import ArgumentParser
from megatron_iiet.data.preprocess import PreprocessOptions, megatron_flags, preprocess
from megatron_iiet.data.preprocess.language import LANGUAGE_SCORE
from megatron_iiet.data.preprocess.options import parse_count, share_of_work
from megatron_iiet.data.preprocess.work import give_back_large_blocks
from megatron_iiet.data.reading.kinds import ALL_KINDS, FORMATS
from megatron_iiet.data.tokenizers.base import MAX_UNCUT_BYTES
from megatron_iiet.durable import Terminated, leave_cleanly_on_sigterm


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument_group("inputs").add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"files, folders, quoted globs or urls of {ALL_KINDS}; - is standard input",
    )
    add(
        "--input-format",
        metavar="{" + ",".join(sorted({*FORMATS.values()})) + "}",
        help="what standard input, FIFOs and files without a suffix are (default: jsonl)",
    )
    add(
        "--txt-documents",
        metavar="{file,blank-line}",
        default="file",
        help="a document of a .txt: all of it, or what stands between blank lines",
    )
    add(
        "--dataset", metavar="NAME", help="or a Hugging Face dataset, by name on the hub or as a local folder"
    )
    add("--split", help="split of the dataset, such as train")
    add(
        "--streaming", action="store_true", help="read the dataset's files where they are, without a download"
    )
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="one output for each (default: text)")
    add(
        "--text-template",
        metavar="T",
        help=r"or one text made of several keys, such as '{title}\n\n{text}'",
    )
    add(
        "--max-document-bytes",
        metavar="N",
        help="a longer line or row is a bad one, never held in memory (default: a sixteenth of the memory)",
    )
    add("--bad-rows", metavar="{error,skip}", default="error", help="fail, or count and leave out")
    add(
        "--bad-inputs",
        metavar="{fail,skip}",
        default="fail",
        help="an input that cannot be read to its end: fail its shard, or leave it out and say so",
    )

    add = parser.add_argument_group("tokens").add_argument
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="SentencePiece .model, tokenizer.json, vocab.json, tekken.json or .tiktoken",
    )
    add(
        "--max-uncut-bytes",
        type=int,
        default=MAX_UNCUT_BYTES,
        metavar="N",
        help="longest text that is encoded whole, where the tokenizer cannot take it in parts; 44 times its "
        "bytes of memory (default: 8 MiB)",
    )
    add("--append-eod", action="store_true", help="end every document with the eod token")
    add("--eod-token", metavar="TOKEN", help="refuse a tokenizer whose eod token is another")

    add = parser.add_argument_group("outputs").add_argument
    add("--output-prefix", metavar="P", help="one shard: P_text_document")
    add("--output-dir", metavar="D", help="many shards: D/text_document")
    add("--inputs-per-shard", type=int, default=1, metavar="K", help="files for a shard (with --output-dir)")
    add("--split-by", metavar="KEY", help="one output a source, such as meta.redpajama_set_name")
    add(
        "--holdout-validation",
        type=float,
        default=0.0,
        metavar="X",
        help="fraction of documents for validation",
    )
    add("--holdout-test", type=float, default=0.0, metavar="X", help="fraction of documents for test")
    add(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="all documents of an output in an order that the seed names (default: that of the inputs)",
    )
    add("--overwrite", action="store_true", help="remove first what an earlier run made here, nothing else")

    add = parser.add_argument_group("selection").add_argument
    add(
        "--sample-tokens",
        metavar="N",
        help="keep a uniform sample of documents of about N tokens, such as 16B",
    )
    add("--corpus-tokens", metavar="N", help="tokens of the whole corpus (default: estimated)")
    add("--seed", type=int, default=1234, help="of the sample")
    add("--min-characters", type=int, default=0, metavar="N", help="leave shorter documents out")
    add("--max-characters", type=int, metavar="N", help="leave longer documents out")
    add(
        "--language",
        nargs="+",
        default=[],
        metavar="CODE",
        help="leave documents in other languages out: en, de, ... (extra languages)",
    )
    add(
        "--language-score",
        type=float,
        default=LANGUAGE_SCORE,
        metavar="X",
        help="and those whose language the model gives a lower score (default: 0.65)",
    )
    add("--deduplicate", action="store_true", help="drop documents that repeat an earlier one exactly")

    add = parser.add_argument_group("work").add_argument
    add(
        "--workers",
        type=int,
        metavar="N",
        help="tokenizing processes (default: SLURM's cpus per task, else all cores)",
    )
    add("--num-jobs", type=int, metavar="N", help="jobs that share the work (default: as SLURM says, else 1)")
    add("--job", type=int, metavar="I", help="number of this job, from 0 (default: as SLURM says)")
    megatron_flags.add_flags(parser)
    return parser


def parse_arguments() -> PreprocessOptions:
    """Options of the command line.

    Raises:
        ValueError: values that are out of range or contradict each other.
    """
    parser = build_parser()
    known, rest = parser.parse_known_args()
    megatron_flags.refuse_unknown(rest, parser._option_string_actions)
    values = vars(known)
    megatron_flags.translate(values, log=print)
    for name in ("sample_tokens", "corpus_tokens", "max_document_bytes"):
        values[name] = None if values[name] is None else parse_count(values[name])
    values["num_jobs"], values["job"] = share_of_work(os.environ, values["num_jobs"], values["job"])
    if values["workers"] is None:
        values["workers"] = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
    return PreprocessOptions(inputs=values.pop("input"), **values)


def main() -> int:
    leave_cleanly_on_sigterm()
    give_back_large_blocks()
    try:
        report = preprocess(parse_arguments(), log=lambda line: print(line, flush=True))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as signal:
        print(
            "error: interrupted; finished shards stay, run the same command again for the rest.",
            file=sys.stderr,
        )
        return 143 if isinstance(signal, Terminated) else 130
    print(report, flush=True)
    if report.waiting:
        print(report.waiting, file=sys.stderr)
    if report.failures:
        count = len(report.failures)
        print(
            f"{count} shards failed; run the same command again to do only what is missing.", file=sys.stderr
        )
    for failure in report.failures:
        print(f"error: {failure}", file=sys.stderr)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
