package page

import (
	"math"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// palettes reads the colours of both schemes from the style sheet.
func palettes(t *testing.T) map[string]map[string]string {
	t.Helper()
	raw, err := assets.ReadFile("assets/page.css")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string]string{}
	blocks := regexp.MustCompile(`(?s):root \{(.*?)\}`).FindAllStringSubmatch(string(raw), -1)
	if len(blocks) != 2 {
		t.Fatalf("%d blocks of colours, want one for light and one for dark", len(blocks))
	}
	for i, scheme := range []string{"light", "dark"} {
		out[scheme] = map[string]string{}
		for _, m := range regexp.MustCompile(`--([a-z0-9-]+): (#[0-9a-f]{6});`).FindAllStringSubmatch(blocks[i][1], -1) {
			out[scheme][m[1]] = m[2]
		}
	}
	return out
}

// luminance is the relative luminance as WCAG 2 has it.
func luminance(t *testing.T, colour string) float64 {
	t.Helper()
	n, err := strconv.ParseUint(strings.TrimPrefix(colour, "#"), 16, 32)
	if err != nil {
		t.Fatalf("%q: %v", colour, err)
	}
	channel := func(shift uint) float64 {
		c := float64(n>>shift&0xff) / 255
		if c <= 0.04045 {
			return c / 12.92
		}
		return math.Pow((c+0.055)/1.055, 2.4)
	}
	return 0.2126*channel(16) + 0.7152*channel(8) + 0.0722*channel(0)
}

func contrast(t *testing.T, a, b string) float64 {
	t.Helper()
	x, y := luminance(t, a), luminance(t, b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}

func TestContrast(t *testing.T) {
	t.Parallel()
	const text, shape = 4.5, 3
	for scheme, colours := range palettes(t) {
		check := func(front, back string, least float64) {
			t.Helper()
			if got := contrast(t, colours[front], colours[back]); got < least {
				t.Errorf(
					"%s: %s %s on %s %s has a contrast of %.2f, less than %v",
					scheme,
					front,
					colours[front],
					back,
					colours[back],
					got,
					least,
				)
			}
		}
		for back, fronts := range map[string]string{
			"sheet": "text soft link bad warn good", "ground": "text soft link bad warn good",
			"bad-ground": "text soft bad warn", "warn-ground": "text soft warn",
			"good-ground": "text soft good warn", "bad": "sheet", "text": "ground",
		} {
			for front := range strings.FieldsSeq(fronts) {
				check(front, back, text)
			}
		}
		tiles := []string{"r0", "r1", "r2", "r3", "r4"}
		for _, s := range states() {
			if s.State != answers {
				tiles = append(tiles, string(s.State))
			}
		}
		for _, tile := range tiles {
			check(tile+"-ink", tile, text)
		}
		for _, back := range []string{"ground", "sheet"} {
			check("edge", back, shape)
			check("focus", back, shape)
			// What is not well must stand out; a tile that does not by itself has an edge.
			for _, tile := range tiles[5:] {
				if edge := tile + "-edge"; colours[edge] != "" {
					check(edge, back, shape)
				} else if tile != string(notPinged) { // drawn with --edge
					check(tile, back, shape)
				}
			}
		}
		// Shades go one way, so that slow and fast differ without hue.
		for i := range 4 {
			a, b := luminance(t, colours[tiles[i]]), luminance(t, colours[tiles[i+1]])
			if (a > b) != (scheme == "light") {
				t.Errorf("%s: %s is not between its neighbours", scheme, tiles[i+1])
			}
			if got := contrast(t, colours[tiles[i]], colours[tiles[i+1]]); got < 1.2 {
				t.Errorf("%s: %s and %s differ by %.2f", scheme, tiles[i], tiles[i+1], got)
			}
		}
	}
}
