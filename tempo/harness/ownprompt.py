"""The run on a config's own prompt, as a page to walk through that the report links to."""

from __future__ import annotations

import hashlib
import json

import tempo
from tempo import files
from tempo.errors import ResultsError
from tempo.harness.evidence import Evidence
from tempo.harness.plan import Plan
from tempo.harness.runs import Prompt
from tempo.reporting.beside import run_page
from tempo.reporting.report import RUNS
from tempo.viewing.runs import view_prompt

# Of a page with attention. A run of sixteen sets of SmolLM2 has a third of it; wider sets, whose
# page would have several times as much, are shown without attention.
MOST_BYTES = 1_500_000


def write_run(evidence: Evidence, plan: Plan) -> str:
    """The name of the page in the folder `runs` of the results; it is written if it is not there.

    The name is a hash of all that the page depends on. So configs with the same run share a page,
    and a page that is there is taken as it is. Raises ResultsError if it cannot be written.
    """
    config = plan.config
    prompt = Prompt(config.prompt, "own", config, evidence.lm, chat=evidence.chat)
    spec = prompt.spec(capture=())
    made_of = [spec.model_dump(mode="json"), evidence.maker, evidence.model_sha256]
    name = f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}.html"
    path = evidence.results / RUNS / name
    if run_page(path):
        return name
    made = view_prompt(evidence.lm, spec, None, tempo.generate_batch)
    if len(made.html) > MOST_BYTES:
        made = view_prompt(evidence.lm, spec, None, tempo.generate_batch, ("logits",))
    try:
        files.write(path, made.page())
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {files.reason(error)}") from None
    return name
