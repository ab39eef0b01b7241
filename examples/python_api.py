"""The Python face: attach, train, evaluate, save, load, switch."""

import veneer

base = veneer.load_base("smollm2-135m-instruct")  # or a hub id, or a model folder
adapter = base.attach(veneer.LoRA(rank=8), name="orders")
print(adapter)

result = veneer.train(adapter, data="examples/answers.jsonl", validation=0.2, epochs=2, batch_size=4, samples=1)
print(f"trained {result.trainable:,} numbers in {result.seconds:.0f} s")

report = veneer.evaluate(adapter, "examples/answers.jsonl", limit=4)
print({name: round(score.value, 3) for name, score in report.adapter.items()})

adapter.save("adapters/orders")  # peft, vLLM and others read this folder

again = base.load("adapters/orders", name="again")
question = {"prompt": "Order: one bagel to go."}
print(next(veneer.predict(again, [question])))

# The base stays plain; an adapter acts when it is called, or inside `using`.
ids = base.tokenizer("Order:", return_tensors="pt")
plain = base.model(**ids).logits
with base.using("orders"):
    adapted = base.model(**ids).logits
print("the adapter changes the output:", bool((plain != adapted).any()))
