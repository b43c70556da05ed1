"""A small evaluation of held-out people by the judge, at each validation of a denoiser that is training.

The people are those of evaluation seed 7, which no reported number uses. With so few pictures the scores are rough, but
they show the trend of identity and prompt following; published numbers are measured by `imagine evaluate`.
"""

from pathlib import Path

from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation.cases import Cases, JudgedReal, judge_pictures, judge_real_pictures, make_cases
from imagine.evaluation.judge import Judge
from imagine.evaluation.scores import score
from imagine.evaluation.suites import PORTRAITS
from imagine.people.faces import crop_faces
from imagine.world import render

SEED = 7
GALLERY = 100  # people in the gallery of the rank-1 retrieval


class HeldOutEvaluation:
    """A few held-out people with a few prompts each; the real renders are judged once and cached.

    Raises ConfigError if `weights` holds no judge.
    """

    def __init__(self, weights: Path, people: int = 8, prompts: int = 6, gallery: int = GALLERY) -> None:
        if not (weights / "judge").is_dir():
            raise ConfigError(f"judge: {weights} holds no judge (judge/); name a folder of weights with one, or none.")
        self.judge = Judge.from_pretrained(weights / "judge")
        self.cases: Cases = make_cases(PORTRAITS[:prompts], people, SEED, gallery)
        self._real: JudgedReal | None = None

    @property
    def sentences(self) -> list[str]:
        """The prompts, one per case; all prompts of the first person come first."""
        return [self.cases.prompt(case).text for case in range(len(self.cases))]

    def references(self, size: int) -> Tensor:
        """Return the reference's face crop for every case, (cases, 3, size, size)."""
        out = render(self.cases.people[: self.cases.identities], self.cases.references)
        return crop_faces(out.images, out.boxes, size)[self.cases.person]

    def scores(self, pictures: Tensor) -> dict[str, float]:
        """Score one picture per case (cases, 3, H, W), 0 to 1; return the mean scores and the ceilings of two."""
        real = self._real = self._real or judge_real_pictures(self.cases, self.judge)
        seen = judge_pictures(self.judge, len(self.cases), lambda start, stop: (pictures[start:stop], None))
        mean = {name: float(values.mean()) for name, values in score(self.cases, seen, real).items()}
        ceiling = {name: float(values.mean()) for name, values in score(self.cases, real.rows["ceiling"], real).items()}
        return {
            "prompt": mean["prompt"], "sim_gt": mean["sim_gt"], "copy_paste": mean["copy_paste"],
            f"rank1_of_{len(self.cases.gallery)}": mean["rank1"],
            "prompt_ceiling": ceiling["prompt"], "sim_gt_ceiling": ceiling["sim_gt"],
        }  # fmt: skip
