"""What the main job says to people."""

from pellucid.messages import add

add({
    "grow.stage.tokenizer": ("tokenizer: byte-level BPE", "分词器：字节级 BPE"),
    "grow.stage.pretrain": ("pretraining on raw text", "预训练：原始文本上的语言建模"),
    "grow.stage.sft": ("fine-tuning on thoughts", "监督微调：学会先思考再回答"),
    "grow.stage.grpo": ("reinforcement learning: GRPO", "强化学习：GRPO"),
    "grow.stage.quantize": ("INT8 weights", "量化：INT8 权重"),
    "grow.stage.evaluate": ("pass@k", "评测：pass@k"),
    "grow.stage.tools": ("tool calls through the server", "经服务器调用工具"),
    # Of the final table, which has 80 columns: what the stage's own name does not tell already.
    "grow.short.tokenizer": ("bytes per token", "每词元字节数"),
    "grow.short.pretrain": ("bits per byte", "每字节比特数"),
    "grow.short.sft": ("accuracy", "正确率"),
    "grow.short.grpo": ("accuracy", "正确率"),
    "grow.short.quantize": ("accuracy", "正确率"),
    "grow.short.evaluate": ("pass@8, sampled", "pass@8（采样）"),
    "grow.short.tools": ("problems solved", "解出率"),
    "grow.interrupted": ("stopped; the stages that were done are saved", "已停止；完成的阶段均已保存"),
    "grow.fresh": ("{folder} holds an earlier job: it is replaced (--resume would go on with it)",
                   "{folder} 中有先前的任务：将被替换（用 --resume 可继续）"),
    "grow.resumed": ("going on; done so far: {done}", "继续；已完成：{done}"),
    "grow.plan": ("plan", "计划"),
    "grow.memory": ("predicted memory", "预计内存"),
    "grow.machine": ("matrix products {fp32:.0f} GFLOP/s in float32, {bf16:.0f} in bfloat16; memory read at {gbs:.0f} GB/s",
                     "矩阵乘 float32 {fp32:.0f} GFLOP/s，bfloat16 {bf16:.0f} GFLOP/s；内存读取 {gbs:.0f} GB/s"),
    "grow.column.stage": ("stage", "阶段"),
    "grow.column.metric": ("held-out measure", "留出集指标"),
    "grow.column.before": ("before", "之前"),
    "grow.column.after": ("after", "之后"),
    "grow.column.time": ("time", "用时"),
    "grow.column.planned": ("planned", "计划"),
    "grow.baselines": ("bits per byte, same held-out text: {list}", "同一留出文本的每字节比特数：{list}"),
    "grow.report": ("report: {path}", "报告：{path}"),
    "grow.talk": ("talk to it: pellucid chat {path}", "与它对话：pellucid chat {path}"),
    "grow.took": ("{spent:.1f} of {asked:g} minutes", "用时 {spent:.1f} 分钟（计划 {asked:g} 分钟）"),
})
