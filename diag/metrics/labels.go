package metrics

import (
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// longestLabel bounds label values, in bytes. The longest host name that Linux knows has 64.
	longestLabel = 64
	// mostValues bounds how many values a label has that stems from a map. All of them are words of our own, far fewer than this.
	mostValues = 32
	// others is the value under which the rest is added up.
	others = "other"
)

// clean makes a text fit for a label: some come from other nodes, who may write what they like into their leases. What doesn't print
// (line ends, the escapes of terminals, bytes that are no UTF-8, marks that turn the direction of writing) becomes U+FFFD.
func clean(s string) string {
	if len(s) > longestLabel {
		s = s[:longestLabel]
		for len(s) > longestLabel-utf8.UTFMax { // not in the middle of a character
			if r, size := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || size != 1 {
				break
			}
			s = s[:len(s)-1]
		}
	}
	out := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError
	}, s)
	if len(out) > longestLabel { // each U+FFFD is longer than the byte that it stands for
		return clean(out)
	}
	return out
}

// each gives the values of a map by key, and adds up what is beyond mostValues.
func each[N int | int64](m map[string]N, give emit) {
	keys := slices.Sorted(maps.Keys(m))
	var rest N
	for i, k := range keys {
		if i < mostValues && k != others {
			give(float64(m[k]), k)
		} else {
			rest += m[k]
		}
	}
	if rest != 0 {
		give(float64(rest), others)
	}
}
