"""Run lm-eval and guidellm against one server of the demo model: `python -m tools.clients.run`.

Neither reaches beyond this machine. lm-eval's log-likelihoods are compared with those transformers
computes for the same questions, in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from kvkeep.cli.console import OUT, make_table
from kvkeep.config import DEMO_MODEL
from kvkeep.models.text import TextModel
from tests.servers import Server, serving
from tools.clients import recall
from tools.clients.build import command
from tools.clients.recall import Document

QUESTIONS: Final = 48
COMPARED: Final = 8
"""Questions whose log-likelihoods are computed with transformers too, four choices each."""
TOLERANCE: Final = 1e-3
RIGHT: Final = 0.9
LM_EVAL, GUIDELLM = "lm-eval", "guidellm"
TASKS: Final = Path(__file__).with_name("tasks")
SECONDS: Final = 15
STREAMS: Final = 8
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}


class Finding(NamedTuple):
    """One figure a client reached, and whether it is good enough."""

    client: str
    figure: str
    value: float
    good: bool


@dataclass(frozen=True, slots=True)
class Desk:
    """A running server and a folder to work in."""

    server: Server
    folder: Path

    def call(self, client: str, program: str, arguments: list[str], **env: str) -> None:
        """Run a client to its end; raises `RuntimeError` with the end of what it said."""
        log = self.folder / f"{client}.log"
        with log.open("wb") as stream:
            ended = subprocess.run(
                [str(command(client, program)), *arguments],
                cwd=self.folder,
                env={**os.environ, **OFFLINE, "HF_HOME": str(self.folder / "hf"), **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if ended.returncode:
            said = log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(f"{client} ended with {ended.returncode}:\n{said}")


def lm_eval(desk: Desk) -> list[Finding]:
    """Score the held-out questions by log-likelihood and by generation."""
    docs = recall.documents(QUESTIONS)
    recall.write(docs, desk.folder / "recall.jsonl")
    model = {
        "model": "demo",
        "base_url": f"{desk.server.url}/v1/completions",
        "tokenizer": str(DEMO_MODEL),
        "tokenizer_backend": "huggingface",
        "num_concurrent": "4",
        "max_length": "4096",
    }
    arguments = ["run", "--model", "local-completions", "--model_args"]
    arguments += [",".join(f"{name}={value}" for name, value in model.items())]
    arguments += ["--tasks", "kvkeep_recall_choice,kvkeep_recall_generate"]
    arguments += ["--include_path", str(TASKS), "--output_path", "out", "--log_samples"]
    desk.call(LM_EVAL, "lm-eval", arguments, OPENAI_API_KEY=desk.server.keys[LM_EVAL])
    results = json.loads(_only(desk.folder / "out", "results_*.json").read_text())["results"]
    choice = results["kvkeep_recall_choice"]["acc,none"]
    generated = results["kvkeep_recall_generate"]["exact_match,none"]
    off = largest_difference(docs, _only(desk.folder / "out", "samples_kvkeep_recall_choice_*"))
    return [
        Finding(
            LM_EVAL, f"choice of four by log-likelihood, of {QUESTIONS}", choice, choice >= RIGHT
        ),
        Finding(LM_EVAL, f"generated exactly, of {QUESTIONS}", generated, generated >= RIGHT),
        Finding(LM_EVAL, "largest difference from transformers, nats", off, off <= TOLERANCE),
    ]


def largest_difference(docs: list[Document], samples: Path) -> float:
    """Return how far lm-eval's log-likelihoods lie from transformers' at most."""
    lines = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    found = {line["doc_id"]: [float(pair[0]) for pair in line["filtered_resps"]] for line in lines}
    text = TextModel.load(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model.eval()
    return max(
        abs(ours - loglikelihood(model, text, doc.prompt, choice))
        for number, doc in enumerate(docs[:COMPARED])
        for ours, choice in zip(found[number], doc.choices, strict=True)
    )


def loglikelihood(model: Any, text: TextModel, prompt: str, answer: str) -> float:
    """Return the natural logarithm of an answer's probability after a prompt."""
    before = len(text.encode(prompt, add_special_tokens=False))
    ids = torch.tensor([text.encode(prompt + answer, add_special_tokens=False)])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
    chosen = logprobs.gather(1, ids[0, 1:, None])[before - 1 :]
    return float(chosen.sum())


def guidellm(desk: Desk) -> list[Finding]:
    """Let synthetic prompts run for a while on several streams."""
    key = desk.server.keys[GUIDELLM]
    backend = f"kind=openai_http,target={desk.server.url},model=demo,api_key={key}"
    arguments = ["run", "--backend", f"{backend},request_format=/v1/completions"]
    arguments += ["--data", "kind=synthetic_text,prompt_tokens=256,output_tokens=32"]
    arguments += ["--tokenizer", f"kind=huggingface_auto,model={DEMO_MODEL}"]
    arguments += ["--profile", f"kind=concurrent,streams={STREAMS}"]
    arguments += ["--constraint", f"kind=max_duration,seconds={SECONDS}"]
    arguments += ["--output", "kind=json,path=guidellm.json", "--disable-console"]
    desk.call(GUIDELLM, "guidellm", arguments)
    report = json.loads((desk.folder / "guidellm.json").read_text(encoding="utf-8"))
    metrics = report["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    ttft = metrics["time_to_first_token_ms"]["successful"]
    rate = metrics["output_tokens_per_second"]["successful"]["mean"]
    return [
        Finding(GUIDELLM, "requests completed", totals["successful"], totals["successful"] > 0),
        Finding(GUIDELLM, "requests failed", totals["errored"], totals["errored"] == 0),
        Finding(GUIDELLM, "output tokens per second", rate, rate > 0),
        Finding(GUIDELLM, "TTFT, median ms", ttft["median"], ttft["median"] > 0),
    ]


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def main() -> int:
    """Run both; return 0 where every figure is good enough."""
    options = ("--dtype", "float32", "--threads", "2", "--kv-cache-memory-bytes", "512MiB")
    with (
        tempfile.TemporaryDirectory(prefix="kvkeep-clients-") as name,
        serving(Path(name), {LM_EVAL: 0.5, GUIDELLM: 0.5}, *options) as server,
    ):
        desk = Desk(server, Path(name))
        findings = [*lm_eval(desk), *guidellm(desk)]
    rows = [(f.client, f.figure, f"{f.value:.4g}", "yes" if f.good else "NO") for f in findings]
    OUT.print(make_table(("client", "figure", "value", "good"), rows))
    return 0 if all(finding.good for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
