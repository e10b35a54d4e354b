"""What runs, and what is loaded: no program that a page names, no plugin, no pickle, no code of a model."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from loopback import Loopback, body, make_clip, video, watch

from cuepoint.asr.model import PINNED
from cuepoint.download import download
from cuepoint.download.fetch import Session
from cuepoint.download.limiter import Limiter
from cuepoint.download.programs import ProgramRefused, no_programs
from cuepoint.embedding.location import locate
from cuepoint.errors import ConfigError
from cuepoint.layout import Layout
from cuepoint.settings import DownloadSettings, TranscribeSettings, load_settings
from cuepoint.settings.embedding import READY_MADE, EmbeddingModel
from cuepoint.states import Status

EAGER = DownloadSettings(video_interval={"*": 0}, request_interval={"*": 0}, backoff=0, attempts=1)
PROGRAMS = ("ffmpeg", "ffprobe", "avconv", "rtmpdump", "mplayer", "mpv", "phantomjs", "curl", "wget", "aria2c")
SOURCES = [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "demo").glob("*.py")]
# A name that is called, and what it would let in: a shell, code or objects out of data.
FORBIDDEN = {
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "eval": "code",
    "exec": "code",
    "yaml.load": "objects",
    "yaml.unsafe_load": "objects",
    "pickle.load": "objects",
    "pickle.loads": "objects",
    "torch.load": "objects",
    "np.load": "objects",
    "joblib.load": "objects",
}
ALLOWED = {("edge_writers.py", "pickle.load")}  # from the pipe of the process that started this one


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_and_no_code_out_of_data(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN or (path.name, called) in ALLOWED, f"{path}, line {node.lineno}"
            assert "shell" not in {keyword.arg for keyword in node.keywords}, f"{path}, line {node.lineno}"


def test_no_rule_has_a_shell_command():
    for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        words = path.read_text(encoding="utf-8").split()
        assert not {"shell:", "run:", "shell("} & set(words), path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with every program that yt-dlp knows, each of which leaves a trace, and with a plugin and a config."""
    programs, trace = tmp_path / "bin", tmp_path / "trace"
    programs.mkdir()
    trace.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f'#!/bin/sh\necho "{name} version 7.1 $*" | tee -a "{trace}/{name}"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    config = tmp_path / ".config" / "yt-dlp"
    plugin = config / "plugins" / "mine" / "yt_dlp_plugins" / "extractor" / "mine.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(f"open({str(trace / 'plugin')!r}, 'w').close()\n")
    (config / "config").write_text(f"--exec 'touch {trace}/exec'\n--external-downloader curl\n")
    return trace


PAGES = {
    # An encryption that yt-dlp leaves to ffmpeg.
    "encrypted": (
        b"#EXTM3U\n#EXT-X-VERSION:5\n#EXT-X-TARGETDURATION:4\n"
        b'#EXT-X-KEY:METHOD=SAMPLE-AES,URI="http://demo.example/key"\n#EXTINF:4,\nseg.ts\n#EXT-X-ENDLIST\n',
        "application/vnd.apple.mpegurl",
    ),
    # A live stream, which is ffmpeg's too.
    "live": (
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nseg.ts\n",
        "application/vnd.apple.mpegurl",
    ),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_cannot_start_a_program(machine, tmp_path, monkeypatch, name):
    layout = Layout(tmp_path / "results")
    with Loopback(tmp_path, [video(name, "none.opus", 4.0)]) as site:
        monkeypatch.setenv("CUEPOINT_PROXY", site.proxy_url)
        site.always[f"watch/{name}"] = body(*PAGES[name])
        receipt = download(name, watch(name), layout, EAGER)
    assert receipt.status in {Status.UNAVAILABLE, Status.NOT_YET}, receipt
    assert not list(machine.iterdir())


HOSTILE = b"""<html><head><title>../../../outside %(id)s $(touch /tmp/x)</title>
<meta property="og:title" content="/etc/outside">
<meta property="og:video" content="http://demo.example/clips/..%2f..%2f..%2foutside.opus">
</head><body><video src="http://demo.example/clips/..%2f..%2f..%2foutside.opus"></video></body></html>"""


def test_a_page_writes_nothing_outside_of_the_results(tmp_path, monkeypatch):
    """Its title, its ID and its media's names are paths that lead out."""
    layout = Layout(tmp_path / "a" / "b" / "results")
    clips = tmp_path / "clips"
    clips.mkdir()
    make_clip(clips / "outside.opus", 4.0)
    monkeypatch.setenv("CUEPOINT_PROXY", "")
    with Loopback(clips, []) as site:
        monkeypatch.setenv("CUEPOINT_PROXY", site.proxy_url)
        site.always["watch/hostile"] = body(HOSTILE)
        site.always["clips/../../../outside.opus"] = body((clips / "outside.opus").read_bytes(), "audio/ogg")
        receipt = download("hostile", watch("hostile"), layout, EAGER)
        asked = [asked.thing for asked in site.asked]
    assert any("outside.opus" in thing for thing in asked), asked
    assert receipt.status is Status.OK, receipt
    outside = {path for path in tmp_path.rglob("*") if path.is_file() and layout.results not in path.parents}
    assert outside == {clips / "outside.opus"}


@pytest.mark.parametrize("url", ["rtmp://127.0.0.1/x", "rtsp://127.0.0.1/x", "mms://127.0.0.1/x"])
def test_a_format_cannot_start_a_program(machine, tmp_path, url):
    """What an extractor that meets such an address hands to yt-dlp."""
    session = Session(Layout(tmp_path), EAGER, Limiter(Layout(tmp_path), EAGER), outtmpl=f"{tmp_path}/%(id)s.%(ext)s")
    info = {"id": "x", "title": "x", "url": url, "ext": "flv", "extractor": "generic", "extractor_key": "Generic"}
    session.get_info_extractor("Generic")._real_extract = lambda _: dict(info)
    with pytest.raises(Exception):  # noqa: B017  (whatever yt-dlp makes of a program that is not there)
        session.extract_info("http://demo.example/x", ie_key="Generic")
    assert not list(machine.iterdir())


def test_plugins_and_config_files_of_the_user_are_not_read(machine, tmp_path):
    """In a process of its own, as yt-dlp looks for plugins once."""
    code = (
        "import sys; from pathlib import Path; from cuepoint.layout import Layout;"
        "from cuepoint.settings import DownloadSettings; from cuepoint.download.fetch import Session;"
        "from cuepoint.download.limiter import Limiter;"
        "layout, settings = Layout(Path(sys.argv[1])), DownloadSettings();"
        "params = Session(layout, settings, Limiter(layout, settings)).params;"
        "set_by_config = ('external_downloader', 'postprocessors', 'exec_cmd');"
        "assert not any(params.get(name) for name in set_by_config)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not list(machine.iterdir())


def test_the_refusal_holds_for_the_block_and_for_any_way_to_start_a_program(machine):
    with no_programs():
        for start in (
            lambda: subprocess.run(["ffmpeg"], check=False),
            lambda: os.system("ffmpeg"),
            lambda: os.posix_spawnp("ffmpeg", ["ffmpeg"], os.environ),
        ):
            with pytest.raises(ProgramRefused, match="is not started for a page"):
                start()
    assert not list(machine.iterdir())
    subprocess.run(["ffmpeg"], check=True, capture_output=True)
    assert list(machine.iterdir())


def test_ready_made_models_are_pinned_and_run_no_code():
    for name, entry in READY_MADE.items():
        model = EmbeddingModel.model_validate(entry)
        assert len(model.revision or "") == 40, name
        assert not model.trust_remote_code, name
    assert len(PINNED[TranscribeSettings().model]) == 40
    assert load_settings({}).embedding.use[0] in READY_MADE


@pytest.mark.parametrize("folder", [".", "2_Dense"])
def test_weights_that_are_pickles_only_are_refused(tmp_path, folder):
    """Also those of one module: sentence-transformers takes a pickle where it finds no safetensors."""
    for file in ("config.json", "model.safetensors", f"{folder}/pytorch_model.bin", f"{folder}/model.safetensors"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    assert locate(EmbeddingModel(model=str(tmp_path))).path == tmp_path
    (tmp_path / folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors weights"):
        locate(EmbeddingModel(model=str(tmp_path)))
