# Part of ddss_tf, under the Apache License 2.0.
"""The scales of guidance of a searched sampler, in a pipeline of diffusers.

  from guidance import guidance  # This folder on sys.path.

  images = pipe(prompt, num_inference_steps=K, **guidance(pipe.scheduler)).images

`pipe` has the scheduler of this folder, and takes `guidance_scale` and
`callback_on_step_end`, as `StableDiffusionPipeline`, `StableDiffusionXLPipeline` and
`StableDiffusion3Pipeline` do. The scales are `guidance_scales` in
`scheduler_config.json`, one a step. If all are the same and above 1,
`pipe(..., guidance_scale=that)` is enough, in any pipeline that guides.
"""


class _Scale(float):
  """A scale that is above every other number when it is compared.

  A pipeline guides where its scale is above 1, and lays out the prompts for all
  steps before the first. A sampler may have scales of 1 and less in some.
  """

  def __gt__(self, other):
    return True


def guidance(scheduler) -> dict:
  """Arguments for the pipeline, which then has the scale of each step.

  Args:
    scheduler: a `DDSSScheduler`.

  Returns:
    `guidance_scale`, for the first step, and `callback_on_step_end`, which sets
    it for each of the others.

  Raises:
    ValueError: the sampler was searched without guidance.
  """
  found = scheduler.config.get("guidance_scales")
  if not found:
    raise ValueError("the scheduler must have guidance_scales. Received: one of "
                     "a sampler that was searched without guidance")
  scales = [_Scale(scale) for scale in found]

  def set_scale(pipe, step, timestep, tensors):
    """Called after each step, before the next."""
    del timestep
    if step + 1 < len(scales):
      pipe._guidance_scale = scales[step + 1]  # Its property has no setter.
    return tensors

  return {"guidance_scale": scales[0], "callback_on_step_end": set_scale}
