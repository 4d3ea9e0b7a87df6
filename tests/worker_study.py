"""A study with raw results and several windows, whose measurement can kill its worker."""

from tests.studies import CONFIG, STUDY

# At a prompt that a file in `kill` names, the process that measures it is killed, once.
STUDY = STUDY.replace(
    "from dataclasses import dataclass\n",
    "import os\nimport signal\nfrom dataclasses import dataclass\nfrom pathlib import Path\n\n"
    "import numpy as np\n",
).replace(
    "    isolated, visible = yield",
    '    flag = Path(__file__).with_name("kill") / prompt.text.replace(" ", "-")\n'
    "    if flag.exists():\n"
    "        flag.unlink()\n"
    "        os.kill(os.getpid(), signal.SIGKILL)\n"
    "    if prompt.store:\n"
    "        prompt.store.arrays("
    '"source", distributions=np.stack([s.distribution for s in source.steps]))\n'
    '        prompt.store.json("sets", {"widths": source.widths})\n'
    "    isolated, visible = yield",
)
STARTS = ["The", "A", "In", "On", "At", "Every", "No", "Some"]
NOUNS = ["cat", "dog", "tree", "house", "river"]
# 41 with the config's own one: windows of 16, 16 and 9
PROMPTS = [f"{start} {noun} was" for start in STARTS for noun in NOUNS]
FIRST, MIDDLE, LAST = PROMPTS[0], PROMPTS[20], PROMPTS[-1]


def write(folder):
    """The study's files in a folder."""
    (folder / "test_entropy.py").write_text(STUDY)
    (folder / "entropy.yaml").write_text(CONFIG)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "kill").mkdir()
