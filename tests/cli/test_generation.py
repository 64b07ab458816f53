"""run, chat and bench on a small random model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint
from trine.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model") / "small"))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Standard output of a command that must work."""
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_run_says_the_same_streamed_and_as_json(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    streamed = run(capsys, "run", checkpoint, "Hello", "--max-tokens", "12")
    report = json.loads(run(capsys, "run", checkpoint, "Hello", "--max-tokens", "12", "--json"))
    assert streamed == report["text"] + "\n"
    assert 1 <= report["output_tokens"] <= 12
    assert report["prompt_tokens"] == len("user\nHello") + len("\nassistant\n") + 3  # a token a byte, 3 special ones


def test_run_reads_standard_input(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    piped = run(capsys, "run", checkpoint, "--max-tokens", "6")
    assert piped == run(capsys, "run", checkpoint, "Hello", "--max-tokens", "6")


def test_run_raw_and_system_change_the_prompt(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [
        json.loads(run(capsys, "run", checkpoint, "Hello", "--max-tokens", "1", "--json", *more))["prompt_tokens"]
        for more in ([], ["--raw"], ["--system", "Be brief."])
    ]
    assert counts == [24, 5, 24 + len("system\nBe brief.") + 3]


def test_sampling_options_arrive(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--temperature", "1.5", "--max-tokens", "12")
    one = run(capsys, "run", checkpoint, "Hello", "--seed", "1", *options)
    assert one == run(capsys, "run", checkpoint, "Hello", "--seed", "1", *options)
    assert one != run(capsys, "run", checkpoint, "Hello", "--seed", "2", *options)


def chat(
    checkpoint: str, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str
) -> str:
    """Output of a conversation; the user hangs up after the last line."""
    typed: Iterator[str] = iter(lines)

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    return run(capsys, "chat", checkpoint, "--max-tokens", "5", *argv)


def test_chat_keeps_the_conversation(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    lines = ["/system Be brief.", "One", "Two", "/stats", f"/save {file}"]
    out = chat(checkpoint, lines, monkeypatch, capsys)
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert saved[0]["content"] == "Be brief."
    assert all(message["content"] in out for message in saved if message["role"] == "assistant")
    cached = int(out.partition("prompt tokens, ")[2].partition(" of them cached")[0])
    assert cached >= 16  # the first turn came from the prefix cache


def test_chat_commands(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "One",
        "Two",
        "/undo",
        "/retry",
        "/set temperature 0.5",
        "/set nonsense 1",
        "/set top_p 7",
        "/dance",
        f"/save {file}",
    ]
    out = chat(checkpoint, lines, monkeypatch, capsys)
    assert json.loads(file.read_text())[0]["content"] == "One"
    assert len(json.loads(file.read_text())) == 2
    assert "temperature is 0.5" in out
    assert "/set nonsense 1: write a sampling option" in out
    assert "top_p=7" in out
    assert "there is no command /dance" in out


def test_bench_counts_and_reports(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    argv = ["bench", checkpoint, "--concurrency", "1,3", "--requests", "6", "--input-len", "9", "--output-len", "5"]
    out = run(capsys, *argv, "--json", str(file))
    levels = json.loads(file.read_text())["levels"]
    assert [level["concurrency"] for level in levels] == [1, 3]
    for level in levels:
        assert (level["failed"], level["output_tokens"], level["prompt_tokens"]) == (0, 6 * 5, 6 * 9)
        assert 0 < level["ttft_p50_ms"] <= level["e2e_p50_ms"] <= level["e2e_p99_ms"]
    assert "TTFT p50 ms" in out
