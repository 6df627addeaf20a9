"""Pre-training (stage PT) and supervised fine-tuning (stage SFT): one YAML in, a trained model folder out."""

from __future__ import annotations

from collections.abc import Sequence

from erniekit.config.run import RunConfig
from erniekit.data.chat import choose_template
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.rollout.brief import brief_answers
from erniekit.training.assemble import loss_weights
from erniekit.training.evaluate import figure_names, measure
from erniekit.training.objective import LanguageModelObjective
from erniekit.training.session import Job, TrainResult, run_session


class LanguageModelStage:
    """Next-token prediction; see training.session.Stage."""

    def objective(self, job: Job) -> LanguageModelObjective:
        """What is minimised."""
        return LanguageModelObjective(loss_weights(job.arch, job.cfg))

    def figures(self, sources: Sequence[str]) -> list[str]:
        """The names of what `measure` finds."""
        return figure_names(sources)

    def measure(self, job: Job, model: ErnieForCausalLM) -> dict[str, float]:
        """Loss, perplexity and accuracy of the evaluation data; the loss of each source if there are several."""
        assert job.eval_data
        return measure(
            model, job.eval_data, batch_size=job.eval_rows, max_batches=job.cfg.train.max_evaluate_steps
        )  # fmt: skip

    def answers(self, job: Job, model: ErnieForCausalLM) -> list[str]:
        """What the model says to the first prompts of the evaluation data."""
        template = choose_template(job.tokenizer, job.cfg.data.chat_template)
        return brief_answers(model, job.tokenizer, job.prompts(), template=template)


def train_language_model(cfg: RunConfig) -> TrainResult:
    """Train as the run says; see `run_session`."""
    return run_session(cfg, LanguageModelStage())
