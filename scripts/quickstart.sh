#!/usr/bin/env bash
# From nothing to an answer about an image: install, fetch the real parts, write shards, train, score, ask.
# Run it again at any time: what is finished is not redone. SEED=1 trains with another seed.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
SEED="${SEED:-0}"
run="outputs/quickstart"
[ "$SEED" = 0 ] || run="outputs/quickstart-seed$SEED"

echo "== 1/5 parts: TinyViT-5M, SmolLM2-135M and the questions of easy-vqa"
vlm-adapt weights fetch mobile-sam-tinyvit smollm2-135m-instruct easy-vqa
echo "== 2/5 shards"
vlm-adapt shards write easy_vqa package:easy-vqa data/easy-vqa/train split=train
vlm-adapt shards write easy_vqa package:easy-vqa data/easy-vqa/test split=test
echo "== 3/5 training, then scores on held-out questions (with the right image, and blind)"
vlm-adapt train configs/quickstart.yaml output_dir="$run" seed="$SEED"
echo "== 4/5 report"
vlm-adapt report "$run"
echo "== 5/5 a question about a test image"
picture=$(python - <<'PY'
import tarfile

with tarfile.open("data/easy-vqa/test/000000.tar") as tar:
    member = next(m for m in tar if m.name.endswith(".png"))
    tar.extract(member, "outputs", filter="data")
    print(f"outputs/{member.name}")
PY
)
for question in "what shape is in the image?" "what color is the shape?"; do
    answer=$(vlm-adapt chat "$run" --image "$picture" --prompt "$question" --max-new-tokens 8)
    echo "   image:    $picture"
    echo "   question: $question"
    echo "   answer:   $answer"
done
echo
echo "The picture report: $run/report.html"
echo "Talk to it:         .venv/bin/vlm-adapt chat $run --image $picture"
