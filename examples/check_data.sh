# Look at data before learning from it, and part it: sh examples/check_data.sh
set -e
veneer data check examples/answers.jsonl --base smollm2-135m-instruct
veneer data split examples/answers.jsonl --output parts --validation 0.2 --test 0.2
veneer data check parts/train.jsonl --validation parts/validation.jsonl --test parts/test.jsonl --json > report.json
