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
from erniekit.training.run_folder import RunFolder
from erniekit.training.session import Course, Job, TrainResult, run_session


class LanguageModelStage:
    """Next-token prediction; see training.session.Stage."""

    def figures(self, sources: Sequence[str]) -> list[str]:
        """Loss, perplexity and accuracy of the evaluation data; the loss of each source if there are several."""
        return figure_names(sources)

    def begin(self, job: Job, _model: ErnieForCausalLM, _folder: RunFolder) -> Course:
        """The objective, and how the evaluation data is measured."""

        def measured(model: ErnieForCausalLM) -> dict[str, float]:
            assert job.eval_data
            most = job.cfg.train.max_evaluate_steps
            return measure(model, job.eval_data, batch_size=job.eval_rows, max_batches=most, mesh=job.mesh)

        return Course(LanguageModelObjective(loss_weights(job.arch, job.cfg, mesh=job.mesh)), measured)

    def answers(self, job: Job, model: ErnieForCausalLM) -> list[str]:
        """What the model says to the first prompts of the evaluation data."""
        template = choose_template(job.tokenizer, job.cfg.data.chat_template)
        return brief_answers(model, job.tokenizer, job.prompts(), template=template, mesh=job.mesh)


def train_language_model(cfg: RunConfig) -> TrainResult:
    """Train as the run says; see `run_session`."""
    return run_session(cfg, LanguageModelStage())
