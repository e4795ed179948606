.PHONY: check test fix

check:  ## style, types
	ruff check .
	ruff format --check .
	mypy

test:  ## everything a pull request must pass
	bash scripts/test.sh

fix:  ## what can be put right automatically
	ruff check --fix .
	ruff format .
