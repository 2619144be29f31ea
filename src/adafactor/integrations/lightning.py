"""Lightning: stepping in backward while `fit` runs. Everything else works without a line of ours."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from adafactor._in_backward import InBackward
from adafactor._optimizer import Adafactor


class StepInBackward(Callback):
    """`Trainer(callbacks=[StepInBackward()])`: `step_in_backward()`, with the accumulation that the `Trainer` is given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from adafactor.integrations.lightning import StepInBackward
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=[StepInBackward()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        self._handles: list[InBackward] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the optimizers are there, and before a checkpoint is loaded.

        Raises:
            ValueError: if the optimizers are not ours, gradients are to be clipped, or optimization is manual.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "StepInBackward cannot know which backward pass is the last one in manual optimization; call "
                "step_in_backward(accumulation_steps=...) on the optimizers, in configure_optimizers"
            )
        if trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val must be None with StepInBackward, got {trainer.gradient_clip_val}: gradients are "
                "applied and freed before their norm is known; updates are clipped instead (clip_threshold, on by "
                "default)"
            )
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, Adafactor):
                raise ValueError(
                    f"StepInBackward needs adafactor.Adafactor, got {type(optimizer).__name__}; change "
                    "configure_optimizers, or leave the callback out"
                )
            # The loop's own decision; the public pieces it is made of (batch numbers, limits) are not all public.
            self._handles.append(optimizer.step_in_backward(lambda: not trainer.fit_loop._should_accumulate()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A later `fit` builds optimizers anew, for the same parameters."""
        while self._handles:
            self._handles.pop().remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As after `fit`."""
        self.teardown(trainer, pl_module, "fit")
