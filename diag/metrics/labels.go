package metrics

import (
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// longestLabel bounds label values, in bytes. Linux host names have at most 64.
	longestLabel = 64
	// mostValues bounds the number of values of a label that is read from a map.
	mostValues = 32
	// others is the label value for the sum of the rest.
	others = "other"
)

// clean makes a text safe for a label: other nodes may write anything into their leases. Unprintable characters (line
// ends, terminal escapes, invalid UTF-8, bidirectional marks) become U+FFFD.
func clean(s string) string {
	var out strings.Builder
	for _, r := range s {
		if !unicode.IsPrint(r) {
			r = utf8.RuneError
		}
		if out.Len()+utf8.RuneLen(r) > longestLabel {
			break
		}
		out.WriteRune(r)
	}
	return out.String()
}

// each emits the values of a map by key, and adds up those beyond mostValues.
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
