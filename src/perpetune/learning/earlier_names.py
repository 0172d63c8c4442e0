"""Training settings under other names: of earlier versions of transformers, of other libraries, of callbacks."""

from __future__ import annotations

CALLED = {  # and what to do instead
    "warmup_ratio": "use warmup_steps, where a number below 1 is a share of all steps",
    "group_by_length": "use train_sampling_strategy: group_by_length",
    "evaluation_strategy": "all tasks are evaluated after every task (--evaluate-every)",
    "early_stopping_patience": "choose num_train_epochs with --validation",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "batch_size": "use per_device_train_batch_size",
    "epochs": "use num_train_epochs",
    "lr": "use learning_rate",
    "no_cuda": "use the option --device cpu",
    "lr_scheduler": "use lr_scheduler_type",
    "optimizer": "use optim",
    "gradient_clipping": "use max_grad_norm",
}
