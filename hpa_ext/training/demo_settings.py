"""The fine-tuning step of the demo, and how it was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from .loop import TrainingSettings


@dataclass(frozen=True)
class DemoSettings:
    """Task, LoRA and sizes of the demo's fine-tuning step on the embedded model.

    Chosen on plain tuning (SeqFT) alone, before any merge was run, with seeds 100 to 103; the demo reports seeds 0, 1
    and 2. Asked for was: a task that starts near 0 % and is learnt to at least 90 %, with a MASR of 30 to 70 %
    afterwards, trained until the loss is low and no longer. Looked at were, for seed 100 with rank 8, alpha 16, batches
    of 16 and a constant rate until the loss is below 0.05:

    ========== ============= ===== ======== ====== ============ ========
    task       learning rate steps accuracy MASR   captions     judgement
    ========== ============= ===== ======== ====== ============ ========
    kind       2e-3          200   94 %     88.9 % 98 -> 0 %    too much
    material   2e-3          130   99 %     100 %  98 -> 88 %   too much
    sentence   2e-3          35    95 %     3.9 %  98 -> 20 %   too little
    arithmetic 2e-3          200   90 %     100 %  98 -> 0 %    too much
    reading    2e-3          157   90 %     95.0 % 98 -> 0 %    too much
    compass    2e-3          78    99 %     96.7 % 98 -> 23 %   too much
    yesno      2e-3          200   74 %     58.3 % 98 -> 18 %   not learnt
    material   1e-3          149   99 %     97.8 % 98 -> 98 %   too much
    material   5e-4          240   95 %     55.0 % 98 -> 98 %   taken
    compass    5e-4          153   94 %     0.0 %  98 -> 98 %   too little
    reading    5e-4          300   90 %     2.2 %  98 -> 85 %   too little
    ========== ============= ===== ======== ====== ============ ========

    The setting taken, on the other trial seeds: accuracy 92, 96, 93 %, MASR 63.9, 52.2, 63.9 %, in 239, 219, 300 steps.
    Before tuning: accuracy 0 %, MASR 0 %. Counts: 100 task samples, 60 captions, 60 prompts per safety set.

    ``task_calibration_count`` and ``safety_calibration_count`` are those of the method (128 and 8).
    """

    task: str = "material"
    train_count: int = 1500
    lora_rank: int = 8
    lora_alpha: float = 16.0
    learning_rate: float = 5e-4
    max_steps: int = 300
    stop_loss: float = 0.05
    batch_size: int = 16
    warmup_steps: int = 10
    task_calibration_count: int = 128
    safety_calibration_count: int = 8
    task_count: int = 100
    caption_count: int = 60
    safety_count: int = 60  # per safety set

    def training(self, seed: int) -> TrainingSettings:
        """The settings of the training loop for one seed."""
        return TrainingSettings(
            steps=self.max_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="constant",
            warmup_steps=self.warmup_steps,
            seed=seed,
            stop_loss=self.stop_loss,
        )
