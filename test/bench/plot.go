package bench

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// curve is one line of the plot: a figure over the number of peers.
type curve struct {
	name   string
	colour string
	points []point
}

type point struct{ x, y float64 }

// Plot draws the starts over the number of peers, both axes logarithmic, as an SVG: a cost that grows with the peers is a straight line
// of one slope.
func (r Result) Plot() string {
	curves := []curve{
		r.curve("cold start: until ready", "#c0392b", coldStart, execToReady),
		r.curve("cold start: CPU", "#e67e22", coldStart, cpuOfAll),
		r.curve("warm restart: until ready", "#2471a3", warmRestart, execToReady),
		r.curve("programming the kernel", "#1e8449", "program", ""),
		r.base("programming: the floor", "#7f8c8d", "program", ""),
	}
	return chart{left: 70, top: 20, width: 560, height: 320, minX: 50, maxX: 40000, minY: 1, maxY: 2000}.draw(curves)
}

func (r Result) curve(name, colour, group, what string) curve {
	return r.pick(name, colour, group, what, Row.Value)
}

func (r Result) base(name, colour, group, what string) curve {
	return r.pick(name, colour, group, what, func(row Row) float64 { return Median(row.Base) })
}

func (r Result) pick(name, colour, group, what string, value func(Row) float64) curve {
	c := curve{name: name, colour: colour}
	for _, row := range r.Rows {
		if v := value(row); row.Group == group && row.Peers > 0 && (what == "" || strings.HasSuffix(row.Name, ": "+what)) && v > 0 {
			c.points = append(c.points, point{float64(row.Peers), v})
		}
	}
	return c
}

// chart is the frame that the curves stand in, in pixels and in their own units.
type chart struct {
	left, top, width, height float64
	minX, maxX, minY, maxY   float64
}

func (c chart) x(v float64) float64 {
	return c.left + c.width*math.Log(v/c.minX)/math.Log(c.maxX/c.minX)
}

func (c chart) y(v float64) float64 {
	return c.top + c.height*(1-math.Log(v/c.minY)/math.Log(c.maxY/c.minY))
}

func (c chart) draw(curves []curve) string {
	var b strings.Builder
	const legend, axis = 20, 40
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="12">`+"\n",
		c.left+c.width+20, c.top+c.height+axis+legend*float64(len(curves)))
	fmt.Fprintln(&b, `<rect width="100%" height="100%" fill="#ffffff"/>`)
	c.grid(&b)
	for i, line := range curves {
		at := c.top + c.height + axis + legend*float64(i)
		fmt.Fprintf(&b, `<line x1="%.0f" y1="%.1f" x2="%.0f" y2="%.1f" stroke="%s" stroke-width="2"/><text x="%.0f" y="%.1f">%s</text>`+"\n",
			c.left, at, c.left+30, at, line.colour, c.left+38, at+4, html.EscapeString(line.name))
		var path []string
		for _, p := range line.points {
			path = append(path, fmt.Sprintf("%.1f,%.1f", c.x(p.x), c.y(p.y)))
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"><title>%s: %s ms</title></circle>`+"\n",
				c.x(p.x), c.y(p.y), line.colour, peers(int(p.x)), number(p.y))
		}
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(path, " "), line.colour)
	}
	fmt.Fprintln(&b, "</svg>")
	return b.String()
}

func (c chart) grid(b *strings.Builder) {
	const colour = "#dddddd"
	for _, v := range []float64{100, 1000, 5000, 20000} {
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/><text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`+"\n",
			c.x(v), c.top, c.x(v), c.top+c.height, colour, c.x(v), c.top+c.height+16, peers(int(v)))
	}
	for _, v := range []float64{1, 10, 100, 1000} {
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/><text x="%.1f" y="%.1f" text-anchor="end">%s ms</text>`+"\n",
			c.left, c.y(v), c.left+c.width, c.y(v), colour, c.left-6, c.y(v)+4, number(v))
	}
}
