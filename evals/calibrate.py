"""human labels -> calibration.json: how far the local judges agree with people, and whether they may block.

    python -m goldgate.evals.calibrate --data ../shared/data --out evals/calibration.json

EVOUNA-NQ (five systems, human correct/incorrect) is split by question: the constants in judge.py were chosen on the
even half, everything here is reported on the odd half. What did not meet the bars stays advisory.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from goldgate.evals import judge
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import EmbedParams
from goldgate.pipeline.store import digest_file, json_bytes

SYSTEMS = ("fid", "gpt35", "chatgpt", "gpt4", "newbing")
BARS = {
    "pooled_kappa_lower": 0.65,  # people agree with each other at 0.65 to 0.86
    "kappa_of_each_system": 0.5,
    "pooled_sensitivity_lower": 0.8,
    "pooled_specificity_lower": 0.8,
    "significant_rankings_reversed": 0,  # no two systems that people tell apart may be ranked the other way round
}
RESAMPLES = 1000

Row = dict[str, Any]


# ---------------------------------------------------------------- EVOUNA


def evouna(path: Path, half: int) -> list[Row]:
    """Return the questions of one half (0 even: tuning, 1 odd: report) that people judged for all five systems."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        row
        for row in rows
        if not row["improper"]
        and all(row[f"judge_{s}"] is not None and row[f"answer_{s}"] for s in SYSTEMS)
        and int(hashlib.sha256(row["question"].encode()).hexdigest(), 16) % 2 == half
    ]


def wordings(golden: str) -> str:
    """Turn the `/` between accepted answers into the `|` of a fact."""
    return golden.replace("|", " ").replace("/", "|")


def says_fact(row: Row, system: str) -> bool:
    """Judge as for `must_say`."""
    answer = str(row[f"answer_{system}"])
    return judge.correctness(answer, (wordings(row["golden_answer"]),), None, row["question"])[0] == 1


def agrees(row: Row, system: str) -> bool:
    """Judge as for `expected_answer` alone."""
    answer = str(row[f"answer_{system}"])
    share, _ = judge.correctness(answer, (), wordings(row["golden_answer"]), row["question"])
    return share >= judge.ANSWER_SHARE


def check_arm(rows: Sequence[Row], judged: Callable[[Row, str], bool]) -> dict[str, Any]:
    """Compare one judge with people, per system and pooled, and hold it against the bars."""
    said = np.array([[judged(row, s) for s in SYSTEMS] for row in rows], dtype=bool)
    human = np.array([[bool(row[f"judge_{s}"]) for s in SYSTEMS] for row in rows], dtype=bool)
    systems = {s: agreement(said[:, [i]], human[:, [i]]) for i, s in enumerate(SYSTEMS)}
    pooled = agreement(said, human)
    reversed_pairs = reversals(said, human)
    met = {
        "pooled_kappa_lower": pooled["kappa"]["lower"] >= BARS["pooled_kappa_lower"],
        "kappa_of_each_system": min(s["kappa"]["value"] for s in systems.values()) >= BARS["kappa_of_each_system"],
        "pooled_sensitivity_lower": pooled["sensitivity"]["lower"] >= BARS["pooled_sensitivity_lower"],
        "pooled_specificity_lower": pooled["specificity"]["lower"] >= BARS["pooled_specificity_lower"],
        "significant_rankings_reversed": len(reversed_pairs) <= BARS["significant_rankings_reversed"],
    }
    bias = [s["judge_mean"] - s["human_mean"] for s in systems.values()]
    return {
        "pooled": pooled,
        "systems": systems,
        "bias_range": round(max(bias) - min(bias), 4),
        "rankings_reversed": reversed_pairs,
        "bars_met": met,
        "passes": all(met.values()),
    }


def reversals(said: np.ndarray, human: np.ndarray) -> list[str]:
    """Return the pairs of systems that people tell apart (exact McNemar, 5 %) and the judge ranks the other way."""
    found = []
    for a, b in itertools.combinations(range(human.shape[1]), 2):
        better = int((human[:, a] & ~human[:, b]).sum())
        worse = int((human[:, b] & ~human[:, a]).sum())
        p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        judged = int(said[:, a].sum()) - int(said[:, b].sum())
        if p < 0.05 and judged * (better - worse) < 0:
            found.append(f"{SYSTEMS[a]} {SYSTEMS[b]}")
    return found


# ---------------------------------------------------------------- agreement


def agreement(said: np.ndarray, human: np.ndarray) -> dict[str, Any]:
    """Return agreement, kappa, sensitivity and specificity with 95 % intervals; rows are questions (clusters)."""
    cells = np.stack([(said & human), (said & ~human), (~said & human), (~said & ~human)]).sum(axis=2)  # 4 x questions
    tp, fp, fn, tn = (int(n) for n in cells.sum(axis=1))
    return {
        "n": tp + fp + fn + tn,
        "human_mean": round((tp + fn) / (tp + fp + fn + tn), 4),
        "judge_mean": round((tp + fp) / (tp + fp + fn + tn), 4),
        "agreement": share(tp + tn, tp + fp + fn + tn),
        "sensitivity": share(tp, tp + fn),
        "specificity": share(tn, tn + fp),
        "kappa": _bootstrapped(cells),
    }


def share(part: int, whole: int) -> dict[str, float]:
    """Return a proportion with its exact (Clopper-Pearson) 95 % interval."""
    interval = stats.binomtest(part, whole).proportion_ci(0.95, method="exact")
    return {"value": round(part / whole, 4), "lower": round(interval.low, 4), "upper": round(interval.high, 4)}


def kappa(cells: np.ndarray) -> np.ndarray:
    """Cohen's kappa of (true, false+, false-, true-) counts along the first axis."""
    tp, fp, fn, tn = cells.astype(float)
    n = tp + fp + fn + tn
    expected = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / n**2
    value: np.ndarray = ((tp + tn) / n - expected) / np.maximum(1 - expected, 1e-12)
    return value


def _bootstrapped(cells: np.ndarray) -> dict[str, float]:
    """Kappa with a 95 % interval from resampled questions: one question's answers are not independent."""
    rng = np.random.default_rng(20240501)
    questions = cells.shape[1]
    weights = rng.multinomial(questions, np.full(questions, 1 / questions), size=RESAMPLES)
    lower, upper = np.quantile(kappa(cells @ weights.T), [0.025, 0.975])
    value = float(kappa(cells.sum(axis=1)))
    return {"value": round(value, 4), "lower": round(float(lower), 4), "upper": round(float(upper), 4)}


# ---------------------------------------------------------------- abstention, faithfulness, relevance


def check_abstention(mtrag: Path, evouna_rows: Sequence[Row]) -> dict[str, Any]:
    """Count refusals where a question has an answer and where it has none, and among answers that people call right."""
    rows = [json.loads(line) for line in mtrag.read_text(encoding="utf-8").splitlines()]
    table: dict[str, list[int]] = {}
    for row in rows:
        seen = table.setdefault("+".join(row["answerability"]).lower(), [0, 0])
        seen[0] += judge.is_abstention(row["response"])
        seen[1] += 1
    right = [str(r[f"answer_{s}"]) for r in evouna_rows for s in SYSTEMS if r[f"judge_{s}"]]
    refused = sum(judge.is_abstention(text) for text in right)
    return {
        "mtrag": {name: {"refused": refused_, "n": n} for name, (refused_, n) in sorted(table.items())},
        "evouna_right_answers_called_refusals": share(refused, len(right)),
        "passes": True,
        "note": "fixed rules; no judgement of content",
    }


def check_faithfulness(data: Path, similarity: judge.Similarity) -> dict[str, Any]:
    """Compare with people's labels on WiCE claims and MT-RAG answers."""
    wice = [json.loads(line) for line in _lines(data / "wice" / "entailment_retrieval" / "claim" / "dev.jsonl")][::2]
    rated = [json.loads(line) for line in _lines(data / "mtrag" / "human_ratings.jsonl")]
    asked = [(r["claim"], ["\n".join(r["evidence"])], "") for r in wice] + [c for r in rated for c in _claims(r)]
    similarity.prefetch(text for claim in asked for text in judge.to_compare(*claim))
    said = [_all_supported([(r["claim"], ["\n".join(r["evidence"])], "")], similarity) for r in wice]
    human = [r["label"] == "supported" for r in wice]
    rated = [r for r in rated if _claims(r)]
    rated_said = [_all_supported(_claims(r), similarity) for r in rated]
    rated_human = [float(np.mean(r["human"]["faithfulness"])) >= 3.5 for r in rated]
    return {
        "wice": agreement(np.array(said)[:, None], np.array(human)[:, None]),
        "mtrag": agreement(np.array(rated_said)[:, None], np.array(rated_human)[:, None]),
        "passes": False,
        "note": "advisory: a lexical judge with an embedding model, not yet good enough to block",
    }


def _claims(row: Row) -> list[tuple[str, list[str], str]]:
    """Return (claim, passages, question) for each claim of an MT-RAG answer; nothing for a refusal."""
    if judge.is_abstention(row["response"]):
        return []
    texts = [context["text"] for context in row["contexts"]]
    return [(claim, texts, row["turns"][-1]["text"]) for claim in judge.split_claims(row["response"])]


def _all_supported(claims: Sequence[tuple[str, list[str], str]], similarity: judge.Similarity) -> bool:
    """Three quarters of the claims are supported."""
    supported = [judge.supports(claim, texts, similarity, question).supported for claim, texts, question in claims]
    return sum(supported) / len(supported) >= 0.75


def check_relevance(data: Path, similarity: judge.Similarity) -> dict[str, Any]:
    """Compare question and passage relevance with evidence: XQuAD's paragraph against its nearest four others."""
    paragraphs, asked = _xquad(data / "xquad" / "xquad.en.json")
    similarity.prefetch([*paragraphs, *(question for question, _ in asked)])
    said, human = [], []
    for question, right in asked:
        cosines = np.array([similarity.cosine(question, paragraph) for paragraph in paragraphs])
        nearest = [i for i in np.argsort(-cosines, kind="stable") if i != right][:4]
        for i in (right, *nearest):
            said.append(judge.relevance(question, paragraphs[i], similarity) >= 0.5)
            human.append(i == right)
    return {
        "xquad": agreement(np.array(said).reshape(-1, 5), np.array(human).reshape(-1, 5)),
        "passes": False,
        "note": "advisory: checked against evidence, not against people",
    }


def _xquad(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    paragraphs: list[str] = []
    asked: list[tuple[str, int]] = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                if int(hashlib.sha256(qa["id"].encode()).hexdigest(), 16) % 8 == 1:
                    asked += [(qa["question"], len(paragraphs))]
            paragraphs.append(paragraph["context"])
    return paragraphs, asked


def _lines(path: Path) -> Iterable[str]:
    return path.read_text(encoding="utf-8").splitlines()


# ---------------------------------------------------------------- command


def calibrate(data: Path, similarity: judge.Similarity | None) -> dict[str, Any]:
    """Return the calibration record. Raises UsageError when the labels are not there."""
    labels = data / "evouna" / "NQ.json"
    if not labels.is_file():
        raise UsageError(f"{labels} does not exist", "EVOUNA-NQ", "name the data folder with --data")
    rows = evouna(labels, 1)
    arms = {"facts": check_arm(rows, says_fact), "expected": check_arm(rows, agrees)}
    metrics: dict[str, Any] = {
        "correctness": {"questions": len(rows), "arms": arms, "passes": all(arm["passes"] for arm in arms.values())},
        "abstention": check_abstention(data / "mtrag" / "human_ratings.jsonl", rows),
    }
    if similarity is not None:
        metrics["faithfulness"] = check_faithfulness(data, similarity)
        metrics["contextual_relevance"] = check_relevance(data, similarity)
    for record in metrics.values():
        record["judge_digest"] = judge.judge_digest()
    sources = ("evouna/NQ.json", "mtrag/human_ratings.jsonl")
    return {
        "format_version": 1,
        "bars": BARS,
        "data": {name: digest_file(data / name) for name in sources},
        "embedder": similarity.digest if similarity else "",
        "metrics": metrics,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the file; the summary goes to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of human labels")
    parser.add_argument("--out", type=Path, default=Path("evals/calibration.json"), help="file to write")
    parser.add_argument("--no-embedder", action="store_true", help="leave out what needs the embedding model")
    options = parser.parse_args(arguments)
    similarity = None
    if not options.no_embedder and find_spec("torch") is not None:
        from goldgate.pipeline.embedder import load_embedder

        similarity = judge.Similarity(load_embedder(EmbedParams(), dtype="float32"))
    try:
        record = calibrate(options.data, similarity)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    options.out.write_bytes(json_bytes(record))
    for name, measured in sorted(record["metrics"].items()):
        sys.stdout.write(f"{name}: {'calibrated' if measured['passes'] else 'advisory'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
