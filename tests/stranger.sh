#!/bin/sh
# A stranger with the wheel: an empty folder, a study of his own, prompts of his own.
# usage: stranger.sh BIN, the folder of the environment's programs.
set -eu
bin=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$bin/python" -c 'import tempo, sys; assert "site-packages" in tempo.__file__, tempo.__file__'
"$bin/tempo" new entropy
printf '%s\n' 'Es war einmal ein' 'Der Hund lief' 'Heute ist das Wetter' 'In der Stadt' \
  'Meine Mutter sagt' 'Am Abend' > prompts.txt
"$bin/python" -m pytest . --model tiny --suite prompts.txt
grep -q '6 prompts' reports/findings.html
before=$(cksum < reports/findings.html)
rm entropy.yaml
code=0
"$bin/python" -m pytest . --model tiny --suite prompts.txt 2> errors.txt || code=$?
test "$code" = 4
test "$(grep -c . errors.txt)" = 1
grep -q 'ERROR: .*no config' errors.txt
test "$before" = "$(cksum < reports/findings.html)"
echo "a study of one's own runs from the wheel; without its config it is one line, exit 4"
