package bench

import (
	"fmt"
	"math"
	"strings"
)

// The frame of the plot in pixels, and the ranges of both axes, in peers and in ms.
const (
	plotLeft, plotTop, plotWidth, plotHeight = 70, 20, 560, 320
	plotBottom, plotRight                    = plotTop + plotHeight, plotLeft + plotWidth

	minPeers, maxPeers   = 50, 40000
	minMillis, maxMillis = 1, 2000
)

func plotX(peers float64) float64 {
	return plotLeft + plotWidth*math.Log(peers/minPeers)/math.Log(maxPeers/minPeers)
}

func plotY(millis float64) float64 {
	return plotBottom - plotHeight*math.Log(millis/minMillis)/math.Log(maxMillis/minMillis)
}

// Plot draws the starts over the number of peers, both axes logarithmic, as an SVG: a cost that grows with the peers is
// a straight line of one slope.
func (r Result) Plot() string {
	curves := []struct {
		name, colour, group, row string
		value                    func(Row) float64
	}{
		{"cold start: until ready", "#c0392b", coldStart, execToReady, Row.Value},
		{"cold start: CPU", "#e67e22", coldStart, cpuOfAll, Row.Value},
		{"warm restart: until ready", "#2471a3", warmRestart, execToReady, Row.Value},
		{"programming the kernel", "#1e8449", "program", programAll, Row.Value},
		{"programming: the floor", "#7f8c8d", "program", programAll, func(row Row) float64 { return Median(row.Base) }},
	}
	const legend, axis, grey = 20, 40, "#dddddd"
	var d drawing
	for _, n := range []int{100, 1000, 5000, 20000} {
		d.line(plotX(float64(n)), plotTop, plotX(float64(n)), plotBottom, grey)
		d.text(plotX(float64(n)), plotBottom+16, "middle", peers(n))
	}
	for _, ms := range []float64{1, 10, 100, 1000} {
		d.line(plotLeft, plotY(ms), plotRight, plotY(ms), grey)
		d.text(plotLeft-6, plotY(ms)+4, "end", number(ms)+" ms")
	}
	for i, c := range curves {
		y := float64(plotBottom + axis + legend*i)
		d.line(plotLeft, y, plotLeft+30, y, c.colour)
		d.text(plotLeft+38, y+4, "start", c.name)
		var last *Row
		for _, row := range r.Rows {
			if row.Group != c.group || !strings.HasSuffix(row.Name, ": "+c.row) {
				continue
			}
			d.point(plotX(float64(row.Peers)), plotY(c.value(row)), c.colour, peers(row.Peers)+": "+number(c.value(row))+" ms")
			if last != nil {
				d.line(plotX(float64(last.Peers)), plotY(c.value(*last)), plotX(float64(row.Peers)), plotY(c.value(row)), c.colour)
			}
			last = &row
		}
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="#ffffff"/>
%s</svg>
`, plotRight+20, plotBottom+axis+legend*len(curves), d.String())
}

// drawing is the elements of an SVG.
type drawing struct{ strings.Builder }

func (d *drawing) line(x1, y1, x2, y2 float64, colour string) {
	fmt.Fprintf(&d.Builder, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="2"/>`+"\n",
		x1, y1, x2, y2, colour)
}

func (d *drawing) text(x, y float64, anchor, text string) {
	fmt.Fprintf(&d.Builder, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor, text)
}

func (d *drawing) point(x, y float64, colour, title string) {
	fmt.Fprintf(&d.Builder, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"><title>%s</title></circle>`+"\n", x, y, colour, title)
}
