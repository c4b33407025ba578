#!/usr/bin/env bash
# The main job end to end on real data, on a machine with only Python: handwritten digits to folders, an autoencoder
# fitted to them, latents, a mixture-of-experts diffusion transformer trained by two expert-parallel ranks, 500 samples,
# scores and a report in runs/demo. About ten minutes on two cores. Run again, it goes on where it stopped.
#   bash jobs/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/setup.sh

demo=runs/demo
mkdir -p "$demo"

say() { printf '\n== %s\n' "$*" >&2; }

say "scikit-learn's 1,797 handwritten digits, as folders of 32x32 images"
[ -e "$demo/images" ] || python -m data_prep.digits images --out "$demo/images"

say "a small autoencoder fitted to them"
[ -e "$demo/vae" ] || python -m data_prep.digits autoencoder --images "$demo/images" --out "$demo/vae"

say "images to latent shards"
python -m data_prep.encode_latents --images "$demo/images" --vae "$demo/vae" --size 32 --out "$demo/latents"

say "training on 2 ranks: ZeRO 2, 8 experts over 2 ranks"
deepspeed --num_gpus 2 jobs/train.py --ds ds_configs/zero2_ep2.json --recipe digits \
    --data "$demo/latents" --out "$demo/train"

say "export"
python jobs/export.py "$demo/train" --weights ema --out "$demo/model"

say "500 samples on 2 ranks"
torchrun --nproc_per_node 2 -m eval.sample --model "$demo/model" --vae "$demo/vae" -n 500 --out "$demo/samples"
cp "$demo/samples/samples.png" "$demo/samples.png"

say "scores"
python -m eval.score "$demo/samples" --reference "$demo/images" --out "$demo/metrics.json" >"$demo/scores.txt"

say "which experts see what, and the report"
python -m eval.atlas --model "$demo/model" --data "$demo/latents" --out "$demo/atlas.npz"
python -m eval.report --run "$demo/train" --samples "$demo/samples" --scores "$demo/metrics.json" \
    --atlas "$demo/atlas.npz" --real "$demo/images" --out "$demo/report.html"

say "look at $demo/samples.png and $demo/report.html"
cat "$demo/scores.txt"
